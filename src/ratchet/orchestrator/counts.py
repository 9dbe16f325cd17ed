"""What a batch's row tells that a repetition need not reproduce: clocks, faults, and who did how much."""

import time
from collections import Counter
from dataclasses import dataclass, field

from ratchet import metrics
from ratchet.orchestrator.finished import Finished
from ratchet.orchestrator.play import Player
from ratchet.orchestrator.pool import Pool, Use, use_rows
from ratchet.orchestrator.scheduler import Scheduler
from ratchet.records import Sample

# In every row; others only where they occurred.
_FAULTS = ("retries", "reconciled", "failovers", "servers_lost", "servers_silent")


@dataclass
class _Counts:
    """How far everything had been counted at one instant."""

    since: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    uses: list[Use] = field(default_factory=list)
    replayed: int = 0
    mismatched: int = 0
    input_changed: int = 0
    env_s: float = 0.0
    play_s: float = 0.0


class Counting:
    """Counts from one batch to the next."""

    def __init__(self, pool: Pool, player: Player, finished: Finished, scheduler: Scheduler) -> None:
        self._pool = pool
        self._player = player
        self._finished = finished
        self._scheduler = scheduler
        self._counts = _Counts(uses=pool.usage())

    def row(self, samples: list[Sample]) -> metrics.Row:
        """What a clock or a fault touches; and the counting starts afresh."""
        before = self._counts
        now = _Counts(
            faults=self._pool.faults,
            uses=self._pool.usage(),
            replayed=self._finished.replayed,
            mismatched=self._finished.mismatched,
            input_changed=self._finished.input_changed + self._scheduler.input_changed,
            env_s=self._player.env_s,
            play_s=self._player.play_s,
        )
        self._counts = now
        step_s = now.since - before.since
        faults: Counter[str] = Counter(dict.fromkeys(_FAULTS, 0))
        faults.update(now.faults)
        faults.subtract(before.faults)
        return {
            "time/at_s": round(time.time(), 3),
            "time/step_s": step_s,
            "time/env_s": round(now.env_s - before.env_s, 4),
            "time/rollouts_s": round(now.play_s - before.play_s, 4),
            "perf/groups_in_flight": self._scheduler.running,
            "perf/groups_ready": self._scheduler.ready,
            "perf/tokens_per_s": sum(sum(sample.mask) for sample in samples) / max(step_s, 1e-9),
            **use_rows(before.uses, now.uses, step_s),
            **{f"fault/{name}": count for name, count in faults.items()},
            "fault/replayed_from_journal": now.replayed - before.replayed,
            "fault/journal_mismatch": now.mismatched - before.mismatched,
            "fault/input_changed": now.input_changed - before.input_changed,
        }
