"""The update on what a rank holds is torch's own update of the whole."""

import pytest
import torch
from torch import nn

from ratchet.trainer import packing
from training import Run, batch, settings

OPTIM = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-7}


@pytest.mark.parametrize("max_norm", [0.05, None])
def test_clipping_and_adamw_have_the_bits_of_torchs(world, tmp_path, max_norm):
    run = Run(tmp_path, world, settings(optim=OPTIM | {"max_norm": max_norm}))
    optimizer = run.updater.optimizer
    plain = {name: nn.Parameter(p.full_tensor().clone()) for name, p in run.model.named_parameters()}
    groups = [
        {"params": [p for p in plain.values() if p.ndim >= 2], "weight_decay": OPTIM["weight_decay"]},
        {"params": [p for p in plain.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=OPTIM["betas"], eps=OPTIM["eps"], fused=True)
    for step in range(3):
        parts = packing.micro_batches(batch(step).examples, 256, 0, 1)
        run.updater.passes.run(parts, 1.0, batch(step).trained_tokens)
        for name, p in run.model.named_parameters():
            plain[name].grad = p.grad.full_tensor().clone()
        norm = nn.utils.clip_grad_norm_(list(plain.values()), max_norm or float("inf"))
        assert optimizer.clip().equal(norm)
        assert norm > 0.05
        optimizer.step(1.0)
        torchs.step()
        for name, p in run.model.named_parameters():
            assert p.grad is None
            assert p.full_tensor().equal(plain[name]), name
