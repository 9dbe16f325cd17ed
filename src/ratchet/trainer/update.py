"""One optimizer step: forward and backward over the micro-batches, clip, update."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ratchet.config import RLConfig, SFTConfig, TrainerConfig
from ratchet.errors import PoisonBatch
from ratchet.log import LOGGER
from ratchet.models import attention, branches
from ratchet.models.logprobs import Policy
from ratchet.rng import derive
from ratchet.trainer import loss, packing
from ratchet.trainer.loss import LossSum
from ratchet.trainer.optim import Optimizer
from ratchet.trainer.packing import MicroBatch
from ratchet.trainer.sharding import shard
from ratchet.trainer.source import Batch
from ratchet.trainer.world import World

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], LossSum]


def choose_loss(config: SFTConfig | RLConfig) -> LossFunction:
    """The loss of one micro-batch from (logprobs_N, behaviour_N, advantages_N)."""
    if isinstance(config, SFTConfig):
        return lambda logprobs_N, behaviour_N, advantages_N: loss.cross_entropy(logprobs_N)
    settings = config.trainer.loss
    return lambda logprobs_N, behaviour_N, advantages_N: loss.policy_gradient(
        logprobs_N, behaviour_N, advantages_N, settings
    )


def open_updater(model: PreTrainedModel, config: SFTConfig | RLConfig, world: World) -> "Updater":
    """Shard a model and give it an optimizer and a loss."""
    dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    attention.choose(model, world.device, dtype)
    policy = shard(model, config.trainer, world)
    optimizer = Optimizer(model, config.trainer.optim)
    shares_prompts = config.trainer.share_prompts and not config.trainer.compile and branches.are_known(model)
    if config.trainer.share_prompts and not shares_prompts:
        LOGGER.info(
            "equal prompts are computed once for each sequence: layers are compiled, or %s is not known",
            model.config.model_type,
        )
    return Updater(policy, optimizer, world, config.trainer, choose_loss(config), config.seed, shares_prompts)


class Outcome:
    """The figures of one update, which the device may still be computing."""

    def __init__(self, step: int, names: list[str], values_F: torch.Tensor) -> None:
        self._step, self._names, self._values_F = step, names, values_F

    def is_poison(self) -> torch.Tensor:
        """Whether loss or gradient are not finite, on the device. Shapes: -> () bool"""
        judged = [self._names.index(name) for name in ("loss", "grad_norm")]
        return ~self._values_F[judged].isfinite().all()

    def read(self) -> dict[str, float]:
        """The figures. Waits for: the device. Raises: PoisonBatch if the update was not made."""
        figures = dict(zip(self._names, self._values_F.tolist(), strict=True))
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
            raise PoisonBatch(
                f"Batch {self._step} gives loss {figures['loss']} and gradient norm {figures['grad_norm']}: policy "
                f"{self._step} was not changed, and starting again would read the same batch. Resume from an earlier "
                "checkpoint with --ckpt.resume-step and a lower learning rate."
            )
        return figures


@dataclass
class Updater:
    """Turns policy k into policy k+1."""

    policy: Policy
    optimizer: Optimizer
    world: World
    config: TrainerConfig
    loss: LossFunction
    seed: int
    shares_prompts: bool

    def update(self, batch: Batch, step: int, factor: float) -> dict[str, float]:
        """`begin`, and its figures. Raises: PoisonBatch; the policy is what it was."""
        return self.begin(batch, step, factor).read()

    def begin(self, batch: Batch, step: int, factor: float) -> "Outcome":
        """Train on one batch at `factor` times the peak learning rate, without waiting for the device.

        The loss is the mean over all trained tokens of the step, however they are laid out and sharded. If loss or
        gradient are not finite, nothing is changed, and reading the outcome says so.
        """
        torch.manual_seed(derive(self.seed, "trainer", step, self.world.rank))
        micro = packing.micro_batches(
            batch.examples,
            self.config.micro_batch_tokens,
            self.world.rank,
            self.world.size,
            few_shapes=self.config.compile,
            shares_prompts=self.shares_prompts,
        )
        tokens = batch.trained_tokens
        sums = [
            self._accumulate(part, batch.temperature, tokens, i == len(micro) - 1)
            for i, part in enumerate(micro)
        ]
        names = list(sums[0])
        totals = torch.stack([torch.stack([part[name] for name in names]) for part in sums]).double().sum(0)
        values = torch.cat([self.world.total(totals) / tokens, self.optimizer.clip().double()[None]])
        outcome = Outcome(step, [*names, "grad_norm"], values)
        if self.optimizer.can_skip:
            self.optimizer.step(factor, outcome.is_poison())
            return outcome
        try:
            outcome.read()
        except PoisonBatch:
            self.optimizer.discard()
            raise
        self.optimizer.step(factor)
        return outcome

    def _accumulate(
        self, part: MicroBatch, temperature: float, tokens: int, is_last: bool
    ) -> dict[str, torch.Tensor]:
        """Add one micro-batch's gradient; gradients are reduced across the ranks with the last one."""
        assert isinstance(self.policy, FSDPModule)
        self.policy.set_requires_gradient_sync(is_last)
        inputs_BT, cells_N, targets_N, behaviour_N, advantages_N = self._to_device(
            part.inputs_BT, part.cells_N, part.targets_N, part.behaviour_N, part.advantages_N
        )
        shared = part.branches and self._to_device(*part.branches)
        logprobs_N = self.policy(inputs_BT, cells_N, targets_N, temperature, shared)
        result = self.loss(logprobs_N, behaviour_N, advantages_N)
        # FSDP averages over the ranks; the loss is a mean over tokens, so the average is undone.
        (result.loss * (self.world.size / tokens)).backward()
        return {"loss": result.loss.detach(), **result.metrics}

    def _to_device(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Copied without waiting for what the device is doing."""
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        if self.world.device.type != "cuda":
            return tensors
        return tuple(tensor.pin_memory().to(self.world.device, non_blocking=True) for tensor in tensors)
