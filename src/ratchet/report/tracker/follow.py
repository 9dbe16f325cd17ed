"""Follow the metric files and hand each row on once, also across deaths, resumes and rollbacks.

    trackers/state.json    of each file: how many bytes were handed on, and the hash of those bytes

A file that still begins with the bytes that were handed on is read on from there. One that does not was rewound: what
was handed on is no longer true, and every row is handed on again, in place of the old ones. The state is written after
the sinks have flushed; rows that they got after that are handed on again, and the sinks let the later ones count.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import xxhash

from ratchet.attempts import Assignment
from ratchet.config import TrackerConfig
from ratchet.log import LOGGER
from ratchet.metrics import Row
from ratchet.stage import Stage

ROLES = ("trainer", "orchestrator", "evals")
STATE = "state.json"
POLL_S = 0.5
SAVE_S = 5.0


class Place(msgspec.Struct, frozen=True):
    """How far one file was handed on."""

    size_bytes: int = 0
    xxh3: str = ""
    step: int = -1
    """Of the last row."""


class Sink(Protocol):
    """One tracker."""

    def begin(self, step: int) -> None:
        """Rows of `step` and later ones follow: what was written of them before must not count any more."""
        ...

    def write(self, role: str, row: Row) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def open_sinks(run: Assignment) -> list[Sink]:
    """What is configured; a tracker whose package is missing is said and left out."""
    config: TrackerConfig = run.config.tracker
    found: list[Sink] = []
    if config.tensorboard:
        from ratchet.report.tracker.tensorboard import TensorboardSink

        found.append(TensorboardSink(run.stage, run.paths.trackers / "tensorboard"))
    if config.wandb is not None:
        from ratchet.report.tracker.wandb import WandbSink

        try:
            found.append(WandbSink(run, config.wandb))
        except ImportError:
            LOGGER.warning("tracker.wandb is set, but wandb is not installed: `uv sync --extra wandb`")
    return found


def follow(stage: Stage, sinks: list[Sink], is_asked_to_end: Callable[[], bool]) -> None:
    """Copy rows until asked to end, and then once more. Raises: Fenced if a newer attempt has begun."""
    follower = Follower(stage, sinks)
    saved_at = time.monotonic()
    while True:
        is_last = is_asked_to_end()
        follower.look()
        if is_last or time.monotonic() - saved_at > SAVE_S:
            follower.save()
            saved_at = time.monotonic()
        if is_last:
            break
        time.sleep(POLL_S)
    follower.close()


class Follower:
    """Verbs: look, save, close."""

    def __init__(self, stage: Stage, sinks: list[Sink]) -> None:
        self._stage = stage
        self._sinks = sinks
        self._path = stage.paths.trackers / STATE
        self._path.parent.mkdir(exist_ok=True)
        self._places = _read_state(self._path)
        self._hashers: dict[str, xxhash.xxh3_128] = {}
        self._inodes: dict[str, int] = {}
        self._is_dirty = False
        self._begin(is_rewound=not self._is_prefix())

    def look(self) -> None:
        """Hand on what is new; everything, if what was handed on is no longer the beginning of its file."""
        inodes = {role: _inode(self._stage.paths.metric(role)) for role in ROLES}
        if inodes != self._inodes and not self._is_prefix():
            self._begin(is_rewound=True)
        self._inodes = inodes
        for role in ROLES:
            self._read_on(role)

    def _is_prefix(self) -> bool:
        """Whether every file begins with what was handed on of it."""
        for role, place in self._places.items():
            data = _read(self._stage.paths.metric(role), 0, place.size_bytes)
            if len(data) != place.size_bytes or xxhash.xxh3_128_hexdigest(data) != place.xxh3:
                return False
        return True

    def _begin(self, *, is_rewound: bool) -> None:
        """All files go on at one step: a reader of the curves forgets what it knows of later ones, in all of them."""
        step = 0 if is_rewound else 1 + min((place.step for place in self._places.values()), default=-1)
        self._places = {role: self._place_before(role, step) for role in self._places}
        for role, place in self._places.items():
            self._hashers[role] = xxhash.xxh3_128(_read(self._stage.paths.metric(role), 0, place.size_bytes))
        for sink in self._sinks:
            sink.begin(step)

    def _place_before(self, role: str, step: int) -> Place:
        """The end of the rows below `step`."""
        data = _read(self._stage.paths.metric(role), 0, self._places[role].size_bytes)
        size_bytes, last = 0, -1
        for line in data.splitlines(keepends=True):
            row = _parse(line)
            if row is not None and row["step"] >= step:
                break
            size_bytes += len(line)
            last = row["step"] if row is not None else last
        return Place(size_bytes, xxhash.xxh3_128_hexdigest(data[:size_bytes]), last)

    def _read_on(self, role: str) -> None:
        place = self._places.get(role, Place())
        data = _read(self._stage.paths.metric(role), place.size_bytes)
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return
        step = place.step
        for line in whole.splitlines():
            if (row := _parse(line)) is not None:
                step = row["step"]
                for sink in self._sinks:
                    sink.write(role, row)
        hasher = self._hashers.setdefault(role, xxhash.xxh3_128())
        hasher.update(whole)
        self._places[role] = Place(place.size_bytes + len(whole), hasher.hexdigest(), step)
        self._is_dirty = True

    def save(self) -> None:
        """Flush the sinks, then remember how far they are. Raises: Fenced"""
        self._stage.check()
        if not self._is_dirty:
            return
        for sink in self._sinks:
            sink.flush()
        self._stage.replace(self._path, msgspec.json.encode(self._places))
        self._is_dirty = False

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def _read(path: Path, start: int, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except FileNotFoundError:
        return b""


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


def _read_state(path: Path) -> dict[str, Place]:
    """Nothing where there is no state, or none that can be read: then all rows are handed on."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Place])
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _parse(line: bytes) -> Row | None:
    """None for a line that a power cut left torn."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
