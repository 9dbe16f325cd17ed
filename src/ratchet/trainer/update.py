"""One optimizer step: forward and backward over the micro-batches, clip, update."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ratchet.config import RLConfig, SFTConfig, TrainerConfig
from ratchet.errors import PoisonBatch
from ratchet.log import LOGGER
from ratchet.models import adapters, attention, branches
from ratchet.rng import derive
from ratchet.trainer import loss, packing
from ratchet.trainer.optim import Optimizer
from ratchet.trainer.passes import GatheredPasses, LossFunction, Passes, RecordedPasses
from ratchet.trainer.source import Batch
from ratchet.trainer.world import World


def choose_loss(config: SFTConfig | RLConfig) -> LossFunction:
    if isinstance(config, SFTConfig):
        return lambda logprobs_N, behaviour_N, advantages_N, counts_N: loss.cross_entropy(
            logprobs_N, counts_N
        )
    settings = config.trainer.loss
    return lambda logprobs_N, behaviour_N, advantages_N, counts_N: loss.policy_gradient(
        logprobs_N, behaviour_N, advantages_N, settings, counts_N
    )


def set_mode(model: PreTrainedModel, config: SFTConfig | RLConfig) -> None:
    """SFT drops what the model's own settings say. In RL the policy is the one that sampled, which drops nothing; what
    adapters drop is the run's own setting, and stays.
    """
    is_rl = isinstance(config, RLConfig)
    for name, module in model.named_modules():
        module.training = not is_rl or adapters.DROPOUT in f".{name}."


def open_updater(model: PreTrainedModel, config: SFTConfig | RLConfig, world: World) -> "Updater":
    """Lay a model out on the ranks, and give it an optimizer and a loss."""
    dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    attention.choose(model, world.device, dtype, is_recorded=config.trainer.cuda_graphs)
    set_mode(model, config)
    kind = RecordedPasses if config.trainer.cuda_graphs else GatheredPasses
    passes = kind(model, config.trainer, world, choose_loss(config))
    optimizer = Optimizer(model, config.trainer.optim, world)
    few_shapes = config.trainer.compile or config.trainer.cuda_graphs
    shares_prompts = config.trainer.share_prompts and not few_shapes and branches.are_known(model)
    if config.trainer.share_prompts and not shares_prompts:
        LOGGER.info(
            "equal prompts are computed once for each sequence: layers are compiled or recorded, or %s is not known",
            model.config.model_type,
        )
    return Updater(passes, optimizer, world, config.trainer, config.seed, shares_prompts, few_shapes)


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

    passes: Passes
    optimizer: Optimizer
    world: World
    config: TrainerConfig
    seed: int
    shares_prompts: bool
    few_shapes: bool

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
            few_shapes=self.few_shapes,
            shares_prompts=self.shares_prompts,
        )
        tokens = batch.trained_tokens
        sums = self.passes.run(micro, batch.temperature, tokens)
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
