"""The trainer's metric row of one step: the part that every repetition must reproduce."""

from typing import Any

from ratchet.config import RLConfig, SFTConfig
from ratchet.records import Progress
from ratchet.trainer.source import Batch


def exact_row(
    config: SFTConfig | RLConfig, progress: Progress, batch: Batch, figures: dict[str, float], factor: float
) -> dict[str, Any]:
    """The row of the update that led to `progress.step`, at `factor` times the peak learning rate."""
    optim = config.trainer.optim
    row: dict[str, Any] = {
        "step": progress.step,
        "loss": figures["loss"],
        "lr": optim.lr * factor,
        **({"lr/muon": optim.muon_lr * factor} if optim.type == "muon" else {}),
        **figures,
        "tokens": batch.tokens,
        "tokens/trained": batch.trained_tokens,
        "samples": len(batch.examples),
        **({"data/skipped": batch.skipped} if batch.skipped else {}),
        **batch.metrics,
        "progress/total_samples": progress.total_samples,
        **({"progress/total_skipped": progress.total_skipped} if progress.total_skipped else {}),
        "progress/total_tokens": progress.total_tokens,
    }
    if isinstance(config, RLConfig):
        row["progress/total_problems"] = progress.total_problems
    return row


def advance(progress: Progress, batch: Batch) -> None:
    """Count a batch that was trained on, and what was consumed with it."""
    progress.step += 1
    progress.total_samples += batch.consumed
    progress.total_skipped += batch.skipped
    progress.total_tokens += batch.tokens
    progress.total_problems += batch.problems
