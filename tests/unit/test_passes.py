"""Passes by FSDP2 and those that a GPU records: the same gradient, the same checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import training
from ratchet.models.graphs import Graphs
from ratchet.trainer import passes
from ratchet.trainer.packing import Example, micro_batches
from ratchet.trainer.source import Batch
from training import ROUNDING, SMOOTH, Run, settings

LORA = {"lora": {"rank": 4, "target_modules": ["q_proj", "up_proj"]}}


def full(step):
    """Eight rows of 16 tokens that all count: nothing is padded or filled up."""
    ids = np.random.default_rng(step).integers(3, 60, (8, 17)).tolist()
    return Batch([Example(row, [False, *[True] * 16]) for row in ids])


class OnCPU(Graphs):
    """Does without a GPU what one does: reads inputs from fixed places and writes all results to the same places."""

    shared = {}

    def _can_record(self, device):
        return True

    def _capture(self, function, places):
        results = {}

        def launch():
            for key, value in function(*places).items():
                results[key] = self.shared.setdefault(key, torch.zeros(())).copy_(value)

        return launch, results


@pytest.fixture(params=[False, True], ids=["run", "recorded"])
def graphs(request, monkeypatch):
    """Both ways of the recorded passes."""
    if request.param:
        monkeypatch.setattr(passes, "Graphs", OnCPU)


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
def test_without_padding_they_give_the_same_bits(
    world, tmp_path, monkeypatch, graphs, precision, model, budget
):
    """In one micro-batch, and in two."""
    monkeypatch.setattr("training.batch", full)
    gathered, recorded = pair(tmp_path, world, model=model, precision=precision, micro_batch_tokens=budget)
    assert gathered.train(3) == recorded.train(3)
    assert unequal(gathered.tensors(), recorded.tensors()) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_only_fills_up_changes_nothing_but_rounding(world, tmp_path, graphs, attention):
    """Micro-batches of several shapes."""
    model = {"attention": attention}
    gathered, recorded = pair(tmp_path, world, model=model, optim=SMOOTH, micro_batch_tokens=96)
    assert recorded.train(3) == pytest.approx(gathered.train(3), rel=ROUNDING)
    for name, tensor in gathered.tensors().items():
        torch.testing.assert_close(recorded.tensors()[name], tensor, rtol=0, atol=ROUNDING)


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


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recording_draws_no_random_numbers(world, tmp_path, graphs, dropout):
    """A trainer that starts again records again."""
    lora = {"lora": {"rank": 4, "dropout": dropout, "target_modules": ["q_proj", "up_proj"]}}
    config = settings(cuda_graphs=True, model=lora, micro_batch_tokens=96)
    through = Run(tmp_path, world, config)
    through.train(2)
    through.save()
    through.train(2)
    again = Run(tmp_path, world, config, attempt=2)
    again.restore(2)
    again.train(2)
    assert unequal(through.tensors(), again.tensors()) == []


def test_passes_of_another_temperature_are_others(world, tmp_path, graphs):
    runs = pair(tmp_path, world)
    for temperature in (1.0, 0.5, 1.0):
        batch = replace(full(0), temperature=temperature)
        one, two = (run.updater.update(batch, 0, 0.0) for run in runs)
        assert two == pytest.approx(one, rel=ROUNDING)


def test_a_parameter_that_nothing_reaches_is_left_alone(world, tmp_path, monkeypatch, graphs):
    """Neither decayed nor counted as updated."""
    build = training.build_trainable

    def with_one_more(*given, **named):
        model, base = build(*given, **named)
        model.model.layers[0].register_parameter("idle", torch.nn.Parameter(torch.ones(2, 2)))
        return model, base

    monkeypatch.setattr("training.build_trainable", with_one_more)
    for run in pair(tmp_path, world, optim={"lr": 1e-2, "weight_decay": 0.1}):
        run.train(3)
        name = "model.layers.0.idle"
        assert (run.tensors()[f"model.{name}"] == 1).all()
        steps = run.updater.optimizer.steps()
        assert steps.pop(name) == 0
        assert set(steps.values()) == {3}


def part_of(*lengths):
    """One micro-batch of rows of so many inputs, of which the last five count."""
    rows = [Example(list(range(n + 1)), [False] * (n - 4) + [True] * 5) for n in lengths]
    (part,) = micro_batches(rows, 1 << 20, 0, 1, few_shapes=True)
    return part


def test_few_numbers_of_tokens_occur():
    """Quarters of the cells, sixteen at least."""
    sizes = {}
    for rows in range(1, 33):
        part = part_of(*[60] * rows)
        inputs, cells, targets, _, _, counts = passes._filled(part)
        assert counts.sum() == 5 * rows == len(part.cells_N)
        assert (cells[~counts] == 0).all()
        assert (targets[: 5 * rows] == part.targets_N).all()
        sizes.setdefault(inputs.size, set()).add(len(cells))
    assert sizes == {64: {16}, 128: {32}, 256: {64}, 512: {128}, 1024: {256}, 2048: {512}}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"nproc": 2}, "there are 2"), ({"activation_checkpointing": "full"}, "'full': leave one of them out")],
)
def test_more_ranks_and_recompute_are_refused_where_they_are_read(wrong, says):
    with pytest.raises(ValueError, match=says):
        settings(cuda_graphs=True, **wrong)
