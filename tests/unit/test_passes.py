"""Passes by FSDP2 and those that a GPU records: the same gradient, the same checkpoints."""

import numpy as np
import pytest
import torch

from ratchet.trainer import passes
from ratchet.trainer.packing import Example, micro_batches
from ratchet.trainer.source import Batch
from training import Run, settings

LORA = {"lora": {"rank": 4, "target_modules": ["q_proj", "up_proj"]}}


def full(step):
    """Eight rows of 16 tokens that all count: nothing is padded or filled up."""
    ids = np.random.default_rng(step).integers(3, 60, (8, 17)).tolist()
    return Batch([Example(row, [False, *[True] * 16]) for row in ids])


def pair(root, world, **trainer):
    """The same run, gathered and recorded, with micro-batches of the same shapes."""
    gathered = Run(root / "gathered", world, settings(share_prompts=False, **trainer))
    gathered.updater.few_shapes = True
    return gathered, Run(root / "recorded", world, settings(cuda_graphs=True, **trainer))


def unequal(one, two):
    assert one.keys() == two.keys()
    return [name for name, tensor in one.items() if not torch.equal(two[name], tensor)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [{}, LORA, {"freeze": ["embed"]}])
@pytest.mark.parametrize("budget", [128, 64])
def test_without_padding_they_give_the_same_bits(world, tmp_path, monkeypatch, precision, model, budget):
    """In one micro-batch, and in two."""
    monkeypatch.setattr("training.batch", full)
    gathered, recorded = pair(tmp_path, world, model=model, precision=precision, micro_batch_tokens=budget)
    assert gathered.train(3) == recorded.train(3)
    assert unequal(gathered.tensors(), recorded.tensors()) == []


def test_what_only_fills_up_changes_nothing_but_rounding(world, tmp_path):
    gathered, recorded = pair(tmp_path, world)
    assert recorded.train(3) == pytest.approx(gathered.train(3), abs=1e-5)
    for name, tensor in gathered.tensors().items():
        torch.testing.assert_close(recorded.tensors()[name], tensor, rtol=0, atol=5e-4)


def test_each_goes_on_from_a_checkpoint_of_the_other(world, tmp_path, monkeypatch):
    monkeypatch.setattr("training.batch", full)
    gathered, recorded = pair(tmp_path, world, precision="bf16")
    for run in (gathered, recorded):
        run.train(2)
        run.save()
        run.train(2)
    crossed = [
        Run(recorded.paths.root, world, gathered.config, attempt=2),
        Run(gathered.paths.root, world, recorded.config, attempt=2),
    ]
    crossed[0].updater.few_shapes = True
    for run in crossed:
        run.restore(2)
        run.train(2)
        assert unequal(gathered.tensors(), run.tensors()) == []


def part_of(*lengths):
    """One micro-batch of rows of so many inputs, of which the last five count."""
    rows = [Example(list(range(n + 1)), [False] * (n - 4) + [True] * 5) for n in lengths]
    (part,) = micro_batches(rows, 1 << 20, 0, 1, few_shapes=True)
    return part


def test_few_numbers_of_tokens_occur():
    """Eighths of the cells, sixteen at least."""
    sizes = {}
    for rows in range(1, 33):
        part = part_of(*[60] * rows)
        inputs, cells, targets, _, _, counts = passes._filled(part)
        assert counts.sum() == 5 * rows == len(part.cells_N)
        assert (cells[~counts] == 0).all()
        assert (targets[: 5 * rows] == part.targets_N).all()
        sizes.setdefault(inputs.size, set()).add(len(cells))
    assert sizes == {64: {16}, 128: {16}, 256: {32}, 512: {64}, 1024: {128}, 2048: {256}}


@pytest.mark.parametrize("wrong", [{"nproc": 2}, {"activation_checkpointing": "full"}])
def test_more_ranks_and_recompute_are_refused_where_they_are_read(wrong):
    with pytest.raises(ValueError, match="cuda_graphs needs one process"):
        settings(cuda_graphs=True, **wrong)
