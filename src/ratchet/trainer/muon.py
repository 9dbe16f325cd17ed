"""Muon on sharded matrices: torch's own works in bf16 on every device, which most CPUs compute slowly.

Source: Muon, kellerjordan.github.io/posts/muon (the iteration and its coefficients); Muon is scalable for LLM
training, arXiv:2502.16982 (the update scaled by 0.2 * sqrt(max dim), so that AdamW's rates and decay fit).
"""

import math

import torch
from torch.distributed.tensor import DTensor, Replicate

from ratchet.trainer.world import own

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(update_RC: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with equal singular values, about: they end between 0.7 and 1.2.

    Newton-Schulz, in bf16 on a GPU and in fp32 elsewhere. Shapes: (R, C) -> (R, C)
    """
    a, b, c = COEFFICIENTS
    is_tall = update_RC.size(0) > update_RC.size(1)
    matrix = update_RC.to(torch.bfloat16) if update_RC.is_cuda else update_RC
    matrix = matrix.T if is_tall else matrix
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix.T if is_tall else matrix


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, as the update of a matrix. Its state is `momentum_buffer`, shaped as the matrix."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every matrix that has a gradient; each rank works the whole matrix out and keeps its part."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    buffer = self.state[matrix]["momentum_buffer"]
                    _update(matrix, buffer, group["lr"], group["momentum"], group["weight_decay"])


def _update(
    matrix: torch.Tensor, buffer: torch.Tensor, lr: float, momentum: float, weight_decay: float
) -> None:
    assert matrix.grad is not None
    part, gradient, average = own(matrix), own(matrix.grad), own(buffer)
    average.lerp_(gradient, 1 - momentum)
    update = _like(orthogonalise(_whole(gradient.lerp(average, momentum), matrix)), matrix)
    part.mul_(1 - lr * weight_decay)
    part.add_(update.to(part.dtype), alpha=-lr * 0.2 * math.sqrt(max(matrix.shape)))


def _whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The matrix of which every rank has a part, on every rank."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a matrix that this rank holds."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return whole
    everywhere = [Replicate()] * like.device_mesh.ndim
    sharded = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    return sharded.redistribute(placements=like.placements).to_local()
