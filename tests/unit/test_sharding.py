"""How a model is laid out changes nothing that is learnt: compiled layers, accumulation, copies of the model."""

import shutil

import numpy as np
import pytest
import torch

from ratchet.trainer.packing import Example
from ratchet.trainer.source import Batch
from training import ROUNDING, SMOOTH, Run, settings

LORA = {"lora": {"rank": 4, "dropout": 0.2, "target_modules": ["q_proj", "up_proj"]}}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_micro_batches_of_a_step_change_nothing_but_rounding(world, tmp_path):
    """Seven forward passes or one: the loss is the mean over the tokens of the step."""
    whole = Run(tmp_path / "whole", world, settings(optim=SMOOTH, micro_batch_tokens=8192))
    parts = Run(tmp_path / "parts", world, settings(optim=SMOOTH, micro_batch_tokens=24))
    assert parts.train(1) == pytest.approx(whole.train(1), rel=ROUNDING)
    parts.train(3)
    whole.train(3)
    close(parts.tensors(), whole.tensors())


def groups(step):
    """Two tasks of four rollouts each, as SFT would see them: what follows a prompt is learnt."""
    draw = np.random.default_rng(step)
    made = []
    for length in (6, 9):
        prompt = draw.integers(3, 60, length).tolist()
        for size in draw.integers(1, 8, 4):
            ids = [*prompt, *draw.integers(3, 60, size).tolist()]
            made.append(Example(ids, [False] * length + [True] * int(size)))
    return Batch(made)


@pytest.mark.parametrize("settled", [{}, {"activation_checkpointing": "full"}, {"precision": "bf16"}])
def test_prompts_that_are_shared_change_nothing_but_rounding(world, tmp_path, monkeypatch, settled):
    """Through FSDP, in one forward pass of shared rows."""
    monkeypatch.setattr("training.batch", groups)
    runs = {
        shares: Run(tmp_path / str(shares), world, settings(optim=SMOOTH, share_prompts=shares, **settled))
        for shares in (False, True)
    }
    assert [run.updater.shares_prompts for run in runs.values()] == [False, True]
    figures = {shares: run.train(1) for shares, run in runs.items()}
    if settled.get("precision"):
        assert figures[True]["loss"] == pytest.approx(figures[False]["loss"], abs=2e-2)
    else:
        assert figures[True] == pytest.approx(figures[False], rel=ROUNDING)
        close(runs[True].tensors(), runs[False].tensors())


@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.campaign
@pytest.mark.parametrize("model", [{}, LORA])
def test_compiled_layers_learn_the_same_and_a_restart_changes_no_bit(world, tmp_path, model):
    """A restarted process compiles other shapes first."""
    config = settings(model=model, optim=SMOOTH, compile=True, activation_checkpointing="full")
    plain = Run(tmp_path / "plain", world, settings(model=model, optim=SMOOTH))
    through = Run(tmp_path / "through", world, config)
    plain.train(2)
    through.train(2)
    if not model:  # dropout draws for padding, too
        close(through.tensors(), plain.tensors())
    through.save()
    through.train(4)
    torch._dynamo.reset()
    again = Run(tmp_path / "through", world, config, attempt=2)
    again.restore(2)
    again.train(4)
    found, expected = again.tensors(), through.tensors()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
