"""What each program did when: one line a phase, appended to timeline/<role>.jsonl.

It is history, for people: a run that goes back to a checkpoint keeps the lines of what it did before, so that work
done twice is seen twice. Nothing decides by it, no digest covers it, it is never flushed; a torn line is skipped.

    {"phase": "train", "step": 12, "start": 1764000000.1, "end": 1764000000.9, "attempt": 2, "incarnation": 1}

`start` and `end` are the wall clock's, in seconds; `step` is the policy or batch that the phase is about.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ratchet.paths import RunPaths
from ratchet.stage import Stage


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of one program."""

    phase: str
    step: int
    start: float
    end: float
    attempt: int
    incarnation: int = 1


class Timeline:
    """Writes the phases of one program, which is named by its workshop; without one, nothing."""

    def __init__(self, stage: Stage | None) -> None:
        self._stage = stage

    def add(self, phase: str, step: int, duration_s: float) -> None:
        """A phase that has just ended."""
        if self._stage is None:
            return
        attempt, role, incarnation = self._stage.token.split(".")
        end = time.time()
        span = Span(
            phase=phase,
            step=step,
            start=round(end - duration_s, 4),
            end=round(end, 4),
            attempt=int(attempt),
            incarnation=int(incarnation),
        )
        self._stage.append(self._stage.paths.timeline(role), msgspec.json.encode(span) + b"\n")

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """The body is one phase; one that raises leaves no line."""
        started = time.perf_counter()
        yield
        self.add(name, step, time.perf_counter() - started)


def parse(data: bytes) -> list[Span]:
    """The whole lines in `data`; what does not parse is skipped."""
    found = []
    for line in data.splitlines():
        try:
            found.append(msgspec.json.decode(line, type=Span))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return found


def read(path: Path) -> list[Span]:
    """All phases of a role, in the order in which they ended."""
    return parse(path.read_bytes()) if path.exists() else []


def roles(paths: RunPaths) -> list[str]:
    """The programs that have left a timeline."""
    return sorted(path.stem for path in paths.timelines.glob("*.jsonl"))
