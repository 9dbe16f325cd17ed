"""AdamW, or Muon on the matrices inside the blocks with AdamW on the rest, behind one pair of verbs.

Frozen parameters have no state. All other state exists from the start (zeros), so a new run and a resumed one take
the same path.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ratchet.config import OptimConfig
from ratchet.trainer.adamw import AdamW
from ratchet.trainer.muon import Muon
from ratchet.trainer.world import World, own

# What each kind keeps for one parameter, besides AdamW's step count, which is stored as JSON.
_STATE_NAMES = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


class Optimizer:
    """The optimizers of one model, and their state by parameter name."""

    def __init__(self, model: PreTrainedModel, config: OptimConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        matrices = _block_matrices(model) if config.type == "muon" else set()
        rest = [p for p, name in self._names.items() if name not in matrices]
        self._parts: list[torch.optim.Optimizer] = [_adamw(rest, config)] if rest else []
        if inner := [p for p, name in self._names.items() if name in matrices]:
            self._parts.append(_muon(inner, config))
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self._parts]
        for part, parameter in self._each():
            for name in _STATE_NAMES[type(part).__name__]:
                part.state[parameter][name] = torch.zeros_like(parameter)
            if isinstance(part, AdamW):
                part.state[parameter]["step"] = torch.zeros((), device=parameter.device)

    def _each(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield part, parameter

    @torch.no_grad()
    def clip(self) -> torch.Tensor:
        """Clip all gradients together by their norm; returns the norm before. Shapes: -> ()"""
        grads = [own(p.grad) for p in self._names if p.grad is not None]
        norm = self._world.norm_of_parts(nn.utils.get_total_norm(grads))
        if self._config.max_norm is not None:
            factor = (self._config.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    @property
    def can_skip(self) -> bool:
        """Whether the device itself can leave an update out."""
        return all(isinstance(part, AdamW) for part in self._parts)

    def step(self, factor: float, is_skipped: torch.Tensor | None = None) -> None:
        """One update at `factor` times the peak learning rate; the gradients are gone afterwards.

        Where the device finds `is_skipped` true, () bool, neither parameters nor state change.
        """
        for part, peaks in zip(self._parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            if is_skipped is not None:
                assert isinstance(part, AdamW)
                part.found_inf = is_skipped.float()
            part.step()
        self.discard()

    def discard(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state itself, not a copy, as `<parameter>.<state>`: DCP saves it and loads into it."""
        return {
            f"{self._names[parameter]}.{name}": part.state[parameter][name]
            for part, parameter in self._each()
            for name in _STATE_NAMES[type(part).__name__]
        }

    def steps(self) -> dict[str, int]:
        """AdamW's update count of each parameter."""
        return {
            self._names[parameter]: int(part.state[parameter]["step"])
            for part, parameter in self._each()
            if "step" in part.state[parameter]
        }

    def set_steps(self, steps: dict[str, int]) -> None:
        for part, parameter in self._each():
            if "step" in part.state[parameter]:
                part.state[parameter]["step"].fill_(steps[self._names[parameter]])


def _block_matrices(model: PreTrainedModel) -> set[str]:
    """The 2-D parameters except the embedding and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = {id(p) for module in ends if module is not None for p in module.parameters()}
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in outer}


def _adamw(parameters: list[nn.Parameter], config: OptimConfig) -> AdamW:
    """Weight decay shrinks matrices only, never norms or biases."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _muon(parameters: list[nn.Parameter], config: OptimConfig) -> Muon:
    return Muon(
        parameters, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay
    )
