"""The passes over the micro-batches of a step, forward and backward, which leave the step's gradient on the parameters.

    GatheredPasses   FSDP2 gathers the parameters, and reduces their gradients, on any number of ranks
    RecordedPasses   on one rank: a copy of the model, in fixed places, whose passes are CUDA graphs

Without a GPU `RecordedPasses` compute the same and record nothing. They give the bits of `GatheredPasses`, except where
what only fills up makes a sum longer.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ratchet.config import TrainerConfig
from ratchet.log import LOGGER
from ratchet.models.graphs import Graphs
from ratchet.trainer.loss import LossSum
from ratchet.trainer.packing import MicroBatch
from ratchet.trainer.sharding import lay_out, shard
from ratchet.trainer.world import World

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], LossSum]
"""The loss of one micro-batch from (logprobs_N, behaviour_N, advantages_N, counts_N); see `loss`."""
Figures = dict[str, torch.Tensor]
"""Sums over one micro-batch, () float32 each: `loss`, and what the loss reports."""

_FILLS = 4
"""Parts of the cells of a micro-batch: it is filled up to the next one with tokens that do not count."""
_FEWEST = 16


class Passes(Protocol):
    """How the gradient of a step comes about."""

    def run(self, parts: Sequence[MicroBatch], temperature: float, tokens: int) -> list[Figures]:
        """The figures of each micro-batch, in order; the gradient of the mean over `tokens` is on the parameters."""
        ...


class GatheredPasses:
    """By FSDP2: gradients are added up in fp32, and reduced across the ranks with the last micro-batch."""

    def __init__(
        self, model: PreTrainedModel, config: TrainerConfig, world: World, loss: LossFunction
    ) -> None:
        self._loss = loss
        self._policy = shard(model, config, world)
        self._world = world

    def run(self, parts: Sequence[MicroBatch], temperature: float, tokens: int) -> list[Figures]:
        # FSDP averages over the ranks; the loss is a mean over tokens, so the average is undone.
        scale = self._world.size / tokens
        return [
            self._run(part, temperature, scale, is_last=i == len(parts) - 1) for i, part in enumerate(parts)
        ]

    def _run(self, part: MicroBatch, temperature: float, scale: float, *, is_last: bool) -> Figures:
        assert isinstance(self._policy, FSDPModule)
        self._policy.set_requires_gradient_sync(is_last)
        inputs_BT, cells_N, targets_N, behaviour_N, advantages_N = _to_device(
            self._world.device,
            part.inputs_BT,
            part.cells_N,
            part.targets_N,
            part.behaviour_N,
            part.advantages_N,
        )
        shared = part.branches and _to_device(self._world.device, *part.branches)
        logprobs_N = self._policy(inputs_BT, cells_N, targets_N, temperature, shared)
        result = self._loss(logprobs_N, behaviour_N, advantages_N, None)
        (result.loss * scale).backward()
        return {"loss": result.loss.detach(), **result.metrics}


class RecordedPasses:
    """By CUDA graphs, one for each shape of a micro-batch and each number of tokens that it is filled up to.

    In bf16 the copy has values of its own, which follow the parameters at the begin of each step; in fp32 it shares
    theirs.
    """

    def __init__(
        self, model: PreTrainedModel, config: TrainerConfig, world: World, loss: LossFunction
    ) -> None:
        self._loss = loss
        self._device = world.device
        own = copy.deepcopy(model)  # on the host: the device never holds it in fp32
        model.to(world.device)  # pyright: ignore[reportArgumentType]
        self._is_cast = config.precision == "bf16"
        for weight, mine in zip(model.parameters(), own.parameters(), strict=True):
            mine.data = mine.data.bfloat16() if self._is_cast else weight.data
        for value, mine in zip(model.buffers(), own.buffers(), strict=True):
            mine.data = value.data  # which a restore fills
        self._policy = lay_out(own, config, world.device)
        self._weights: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._copies: list[torch.Tensor] = [p for p in own.parameters() if p.requires_grad]
        self._sums = [torch.zeros_like(weight, requires_grad=False) for weight in self._weights]
        self._reached: set[int] = set()
        """Which of the parameters have a gradient: a zero is not the same as none."""
        self._graphs = Graphs(remedy="set trainer.cuda_graphs = false")
        if world.device.type == "cpu":
            LOGGER.info("trainer.cuda_graphs records nothing on a CPU")

    def run(self, parts: Sequence[MicroBatch], temperature: float, tokens: int) -> list[Figures]:
        if self._is_cast:
            with torch.no_grad():  # frozen ones are what they were
                torch._foreach_copy_(self._copies, self._weights)  # pyright: ignore[reportPrivateImportUsage]
        run = functools.partial(self._run, temperature)
        given = [_to_device(self._device, *_filled(part), np.array(1 / tokens, np.float32)) for part in parts]
        names = [(*inputs[0].shape, *inputs[1].shape, temperature) for inputs in given]
        for name, inputs in zip(names, given, strict=True):
            self._graphs.record(name, run, inputs, self._device)
        for total in self._sums:
            total.zero_()  # recording ran the passes, too
        figures = []
        for name, inputs in zip(names, given, strict=True):
            found = self._graphs.run(name, run, inputs, self._device)
            figures.append({key: value.clone() for key, value in found.items()})
        for i in self._reached:
            self._weights[i].grad = self._sums[i]
        return figures

    def _run(
        self,
        temperature: float,
        inputs_BT: torch.Tensor,
        cells_N: torch.Tensor,
        targets_N: torch.Tensor,
        behaviour_N: torch.Tensor,
        advantages_N: torch.Tensor,
        counts_N: torch.Tensor,
        scale: torch.Tensor,
    ) -> Figures:
        """Both passes over one micro-batch: its gradient is added to the sums."""
        logprobs_N = self._policy(inputs_BT, cells_N, targets_N, temperature)
        result = self._loss(logprobs_N, behaviour_N, advantages_N, counts_N)
        gradients = torch.autograd.grad(result.loss * scale, self._copies, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._reached.add(i)
                self._sums[i] += gradient
        return {"loss": result.loss.detach(), **result.metrics}


def _filled(part: MicroBatch) -> tuple[np.ndarray, ...]:
    """A micro-batch with so many trained tokens that few numbers occur; `counts_N` says which are some.

    Shapes: inputs_BT, cells_N, targets_N int64, behaviour_N, advantages_N float32, counts_N bool
    """
    assert part.branches is None, "rows that share a beginning are not recorded"
    size = len(part.cells_N)
    step = max(_FEWEST, part.inputs_BT.size // _FILLS)
    missing = -size % step if size else step
    arrays = (part.cells_N, part.targets_N, part.behaviour_N, part.advantages_N, np.ones(size, dtype=bool))
    return part.inputs_BT, *(np.pad(array, (0, missing)) for array in arrays)


def _to_device(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Copied without waiting for what the device is doing."""
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    if device.type != "cuda":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
