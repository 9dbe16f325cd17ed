"""Muon against torch's own, which differs only in computing in bf16."""

import pytest
import torch

from ratchet.trainer.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_steps_are_those_of_torch_up_to_its_rounding(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    mine = Muon([ours], **settings)
    mine.state[ours]["momentum_buffer"] = torch.zeros_like(ours)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved = float((theirs - start).detach().norm())
    assert moved > 0.1
    assert float((ours - theirs).detach().norm()) < 0.02 * moved
    assert torch.equal(mine.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])
