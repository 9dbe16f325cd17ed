"""Where the trainer's batches come from: demonstrations (SFT) or the batch log (RL)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ratchet import batchlog
from ratchet.paths import RunPaths
from ratchet.records import Progress, Sample
from ratchet.trainer.packing import Example

POLL_S = 0.005


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    examples: list[Example]
    temperature: float = 1.0
    problems: int = 0
    oldest_served: int | None = None
    """The oldest policy that a server may still hold; weights below it may go."""
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    """Rows of demonstrations that were consumed with it and cannot be trained."""

    @property
    def consumed(self) -> int:
        return len(self.examples) + self.skipped

    @property
    def tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(example.trained_tokens for example in self.examples)


class Source(Protocol):
    """Batch k as a function of how far the trainer has come."""

    @property
    def data_rows(self) -> int | None:
        """How many rows of demonstrations there are; None where batches come from the log."""
        ...

    def wait(self, step: int) -> bool:
        """Wait until batch `step` is there; False if the run is asked to stop meanwhile. Rank 0 calls it."""
        ...

    def read(self, done: Progress) -> Batch:
        """Batch `done.step`, which is there. Every rank calls it."""
        ...


class LogSource:
    """RL: batches from the log, which the orchestrator writes."""

    data_rows = None

    def __init__(self, paths: RunPaths, is_stopping: Callable[[], bool]) -> None:
        self._paths = paths
        self._is_stopping = is_stopping

    def wait(self, step: int) -> bool:
        """Waits for: the orchestrator to publish the batch, or a request to stop."""
        while not batchlog.is_ready(self._paths, step):
            if self._is_stopping():
                return False
            time.sleep(POLL_S)
        return True

    def read(self, done: Progress) -> Batch:
        """Raises: Damaged"""
        samples, manifest = batchlog.read(self._paths, done.step)
        return Batch(
            examples=[_example(sample) for sample in samples],
            temperature=manifest.meta.get("temperature", 1.0),
            problems=len({sample.draw for sample in samples}),
            oldest_served=manifest.meta["oldest_served"],
            metrics={"policy/off_policy_steps": _mean_age(samples, done.step)},
        )


def _example(sample: Sample) -> Example:
    return Example(sample.token_ids, sample.mask, sample.logprobs, sample.advantage)


def _mean_age(samples: list[Sample], step: int) -> float:
    """Steps between the policy that is trained and the one that sampled, by the oldest token of each rollout."""
    return sum(step - sample.oldest_policy for sample in samples) / max(len(samples), 1)
