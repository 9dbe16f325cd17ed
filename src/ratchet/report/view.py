"""What a run shows of itself at one moment, read from its directory alone, running or ended.

`Watcher.look` is cheap enough for every half second: metric files are read on, published names are listed. The
console, `ratchet watch`, `ratchet status` and the report all draw this one picture.
"""

import itertools
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ratchet import attempts, durable, memory, now
from ratchet.attempts import Record
from ratchet.errors import Damaged, RatchetError
from ratchet.metrics import Row
from ratchet.now import Now
from ratchet.paths import RunPaths
from ratchet.records import Manifest
from ratchet.report import health, waits
from ratchet.report.health import Limits, Warning
from ratchet.report.tail import Tail
from ratchet.report.waits import Facts
from ratchet.weights import Places

RECENT = 20


@dataclass(frozen=True)
class Saved:
    """One published checkpoint."""

    step: int
    size_bytes: int
    age_s: float
    is_sound: bool
    attempt: int = 0


@dataclass(frozen=True)
class View:
    """One moment of a run."""

    root: Path
    kind: str
    record: Record
    max_steps: int
    trainer: list[Row]
    orchestrator: list[Row]
    evals: list[Row]
    checkpoints: list[Saved]
    warnings: list[Warning]
    facts: Facts
    now: Now | None = None
    restarts: dict[str, int] = field(default_factory=dict)
    is_gone: bool = False
    """No outcome was recorded, and the launcher is not there any more."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration as it was written: also of a version that knew other keys."""

    @property
    def step(self) -> int:
        return self.trainer[-1]["step"] if self.trainer else 0

    @property
    def is_open(self) -> bool:
        """Whether the attempt goes on, as far as one can see."""
        return self.record.outcome is None and not self.is_gone

    @property
    def state(self) -> str:
        """One word, or two, for what the run is doing."""
        outcome = self.record.outcome
        if self.is_gone:
            return "ended without a record"
        if outcome is None:
            return "running" if self.facts.quiet_s < waits.SLOW_S or self.now is not None else "silent"
        return outcome.reason

    @property
    def stall(self) -> str | None:
        return waits.stall(self.facts) if self.is_open else None

    @property
    def step_s(self) -> float:
        """The median time of the recent steps."""
        return self.facts.usual_s

    @property
    def eta_s(self) -> float | None:
        """The time that the remaining steps take at the pace of the recent ones."""
        left = self.max_steps - self.step
        return left * self.step_s if self.step_s and self.is_open else None

    @property
    def policies(self) -> dict[str, int]:
        """Which policy each program is at."""
        found = {"trainer": self.step}
        if self.kind == "rl":
            found["published"] = self.facts.published
            found["inference"] = self.facts.served
        return found

    @property
    def dropped(self) -> dict[str, int]:
        """Rollouts dropped in the whole run, by reason."""
        total: dict[str, int] = {}
        for row in self.orchestrator:
            for name, count in row.items():
                if name.startswith("rollouts/dropped/"):
                    reason = name.removeprefix("rollouts/dropped/")
                    total[reason] = total.get(reason, 0) + count
        for reason, count in (self.now.dropped if self.now else {}).items():
            total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items()))

    def last(self, name: str) -> Any:
        """The newest value of a quantity, whichever program records it."""
        for rows in (self.trainer, self.orchestrator, self.evals):
            if rows and name in rows[-1]:
                return rows[-1][name]
        return None


class Watcher:
    """Looks at one run again and again. Verbs: look, take."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._tails = {role: Tail(paths.metric(role)) for role in ("trainer", "orchestrator", "evals")}
        self._fresh: dict[str, list[Row]] = {role: [] for role in self._tails}
        self._manifests: dict[int, Manifest] = {}
        self._warnings: list[Warning] = []
        self._checked = (-1, -1)
        self._settings: tuple[int, dict[str, Any]] = (-1, {})

    def look(self) -> View | None:
        """The run as it is now; None before its first attempt was recorded. Raises: Damaged"""
        record = attempts.newest(self._paths)
        if record is None:
            return None
        self._read()
        trainer, orchestrator, evals = (self._tails[r].rows for r in ("trainer", "orchestrator", "evals"))
        settings = self._read_settings(record)
        state = now.read(self._paths) if record.outcome is None else None
        return View(
            root=self._paths.root,
            kind=record.kind,
            record=record,
            max_steps=settings.get("max_steps", 0),
            trainer=trainer,
            orchestrator=orchestrator,
            evals=evals,
            checkpoints=self._checkpoints(),
            warnings=self._check(settings),
            facts=self._facts(record, settings, state),
            now=state,
            restarts=_count(restart.role for restart in record.restarts),
            is_gone=record.outcome is None and attempts.is_gone(self._paths),
            settings=settings,
        )

    def _read(self) -> None:
        for role, tail in self._tails.items():
            self._fresh[role] += tail.look()

    def take(self, role: str) -> list[Row]:
        """The rows of a role that came since the last call. Cheap enough for twenty times a second."""
        self._fresh[role] += self._tails[role].look()
        fresh, self._fresh[role] = self._fresh[role], []
        return fresh

    def _read_settings(self, record: Record) -> dict[str, Any]:
        if self._settings[0] != record.attempt:
            path = self._paths.attempt(record.attempt) / "run.toml"
            try:
                self._settings = (record.attempt, tomllib.loads(path.read_text()))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise Damaged(f"{path} cannot be read ({error}).") from None
        return self._settings[1]

    def _check(self, settings: dict[str, Any]) -> list[Warning]:
        """The warnings, worked out anew only when there are new rows."""
        trainer, orchestrator = self._tails["trainer"].rows, self._tails["orchestrator"].rows
        newest = tuple(rows[-1]["step"] if rows else 0 for rows in (trainer, orchestrator))
        if newest != self._checked and orchestrator:
            limits = Limits(max_off_policy_steps=settings.get("max_off_policy_steps", 8))
            self._warnings = health.check(trainer, orchestrator, limits)
        self._checked = newest
        return self._warnings

    def _checkpoints(self) -> list[Saved]:
        found = []
        for step in durable.steps(self._paths.checkpoints):
            directory = self._paths.checkpoint(step)
            try:
                age = time.time() - directory.stat().st_mtime
                manifest = self._manifests.get(step) or durable.read_manifest(directory)
                durable.check_sizes(directory, manifest)
                self._manifests[step] = manifest
            except FileNotFoundError:
                continue  # retention took it just now
            except RatchetError:
                found.append(Saved(step, 0, 0.0, is_sound=False))
                continue
            size = sum(file.size for file in manifest.files)
            found.append(Saved(step, size, age, is_sound=True, attempt=manifest.attempt))
        return found

    def _facts(self, record: Record, settings: dict[str, Any], state: Now | None) -> Facts:
        paths, trainer = self._paths, self._tails["trainer"].rows
        orchestrator = self._tails["orchestrator"].rows
        places = Places(paths, memory.find_by(settings, record.run_id, record.attempt))
        staged = [path.name.rpartition("_")[2] for path in paths.staging.glob("*.trainer.*/*-checkpoint_*")]
        return Facts(
            kind=record.kind,
            max_steps=settings.get("max_steps", 0),
            trained=trainer[-1]["step"] if trainer else record.plan.step,
            logged=orchestrator[-1]["step"] if orchestrator else 0,
            published=max(places.steps(), default=-1),
            served=state.policy if state else -1,
            max_async_level=settings.get("max_async_level", 0),
            saving=max((int(step) for step in staged if step.isdigit()), default=None),
            evaluating=state.evaluating if state else None,
            in_flight=state.rollouts_running if state else 0,
            quiet_s=_quiet_s(paths),
            usual_s=_usual_s(trainer),
        )


def _usual_s(trainer: list[Row]) -> float:
    """The median distance of the recent rows in time; a restart in between is one value of many."""
    times = [row["time/at_s"] for row in trainer[-RECENT - 1 :] if "time/at_s" in row]
    gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
    return median(gaps) if gaps else 0.0


def _quiet_s(paths: RunPaths) -> float:
    """Since the newest change of what the programs publish and record."""
    places = [paths.batches, paths.weights, paths.checkpoints, paths.evals, paths.attempts]
    places += [paths.metric(role) for role in ("trainer", "orchestrator", "evals")]
    changed = [place.stat().st_mtime for place in places if place.exists()]
    return max(0.0, time.time() - max(changed, default=time.time()))


def _count(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found
