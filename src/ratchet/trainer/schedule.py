"""The learning rate as f(step): nothing accumulates, so nothing has to be restored. Needs no torch.

A small record of it is stored with each checkpoint all the same: resuming refuses when f(step) of an unchanged
configuration disagrees with what the run really used.
"""

import math

import msgspec

from ratchet.config import SchedulerConfig, TrainerConfig
from ratchet.errors import Refusal


class ScheduleRecord(msgspec.Struct, frozen=True):
    """What a checkpoint says about the learning rate; `last_factor` is that of the last update done."""

    type: str
    warmup_steps: int
    horizon_steps: int
    min_lr_ratio: float
    lr: float
    muon_lr: float | None
    last_factor: float


def horizon(config: SchedulerConfig, max_steps: int) -> int:
    """Where the decay ends: a setting of its own, so that extending `max_steps` need not bend the past."""
    return config.horizon_steps or max_steps


def factor(config: SchedulerConfig, max_steps: int, step: int) -> float:
    """The learning rate of the update that turns policy `step` into `step + 1`, relative to the peak.

    Warm-up rises linearly and reaches the peak at update `warmup_steps`; the decay ends at the horizon.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.type == "constant":
        return 1.0
    decay_steps = max(horizon(config, max_steps) - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / decay_steps, 1.0)
    shape = 1 - done if config.type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def record(config: TrainerConfig, max_steps: int, step: int) -> ScheduleRecord:
    """The record of a checkpoint of `step`."""
    scheduler = config.scheduler
    return ScheduleRecord(
        type=scheduler.type,
        warmup_steps=scheduler.warmup_steps,
        horizon_steps=horizon(scheduler, max_steps),
        min_lr_ratio=scheduler.min_lr_ratio,
        lr=config.optim.lr,
        muon_lr=config.optim.muon_lr if config.optim.type == "muon" else None,
        last_factor=factor(scheduler, max_steps, step - 1) if step else 0.0,
    )


def check_record(found: ScheduleRecord, config: TrainerConfig, max_steps: int, step: int) -> None:
    """Raises: Refusal if the settings are those of the record and f(step) is not what it says."""
    now = record(config, max_steps, step)
    settings = msgspec.structs.replace(found, last_factor=now.last_factor)
    if settings == now and found.last_factor != now.last_factor:
        raise Refusal(
            f"The checkpoint of step {step} was made with a learning rate of {found.last_factor!r} of the peak, "
            f"this version computes {now.last_factor!r} from the same settings: resume with the version that "
            "wrote it, or change the schedule on purpose."
        )
