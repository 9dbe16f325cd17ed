"""Attempts: every start of a run, with its resolved configuration, its plan and its outcome.

    launcher    begin() ── record.json: plan, not yet applied ──► resume.apply ──► record.json: applied
    programs    join()  ── config + plan + a workshop of their own
    launcher    finish() ─ record.json: outcome

One launcher holds a run's lock; the record is replaced by rename and hashes itself.
"""

import contextlib
import fcntl
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import msgspec

from ratchet import config_io, hardware, memory
from ratchet.config import RLConfig, RunConfig, SFTConfig
from ratchet.durable import hash_bytes
from ratchet.errors import Damaged, Refusal
from ratchet.inputs.tree import Inputs
from ratchet.paths import RunPaths
from ratchet.stage import Stage

RECORD = "record.json"
KINDS: dict[str, type[RunConfig]] = {"sft": SFTConfig, "rl": RLConfig}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Where an attempt starts. The programs carry it out as if the run began there."""

    step: int = 0
    """The trainer starts here: from checkpoints/step_{step}, or from the initial weights."""
    from_checkpoint: bool = False
    next_batch: int = 0
    """The orchestrator's first new batch; batches step..next_batch-1 are replayed from the log."""
    rollback: bool = False
    """Everything past `step` is moved aside."""
    cuts_log: bool = False
    """Batches are moved aside, so another future begins: its policies are of another lineage."""
    supersede: tuple[str, ...] = ()
    """Published names, relative to the run, that are moved to superseded/<attempt>/."""
    complete: bool = False
    """Nothing is left to do."""
    messages: tuple[str, ...] = ()
    """What the user is told first."""


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended."""

    code: int
    reason: str


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    """A program of an open attempt that the launcher started again, alone."""

    role: str
    incarnation: int
    reason: str
    """What became of the incarnation before it."""
    plan: Plan | None = None
    """Where a trainer starts; the other programs find their place in the log."""


class ForkedFrom(msgspec.Struct, frozen=True):
    """Where a run that `ckpt fork` made comes from."""

    run: str
    run_id: str
    step: int


class Restored(msgspec.Struct, frozen=True):
    """From where a run was brought back into an empty directory."""

    mirror: str
    entry: str
    step: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, as kept in attempts/<n>/record.json."""

    attempt: int
    kind: str
    run_id: str
    lineage: int
    argv: list[str]
    resume_step: int | None
    plan: Plan
    applied: bool = False
    outcome: Outcome | None = None
    announced: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    forked_from: ForkedFrom | msgspec.UnsetType = msgspec.UNSET
    """Only in the first attempt of a fork."""
    restored: Restored | msgspec.UnsetType = msgspec.UNSET
    """Only in the attempt that stands for a restoration from the mirror."""
    inputs: Inputs | msgspec.UnsetType = msgspec.UNSET
    """What the run reads, by content; unset in the attempts of versions before there were names of inputs."""
    fingerprints: dict[str, str] = {}
    """Of model and data, as those versions compared them."""
    config_xxh3: str
    """Of the attempt's run.toml."""
    restarts: tuple[Restart, ...] = ()
    hash: str = ""

    def plan_of(self, role: str) -> Plan:
        """Where the newest incarnation of a role starts."""
        plans = [r.plan for r in self.restarts if r.role == role and r.plan is not None]
        return plans[-1] if plans else self.plan


def environment() -> dict[str, str]:
    """What can make two runs differ although their inputs are equal."""
    packages = ("torch", "transformers", "numpy", "safetensors")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found |= {"processor": hardware.processor()} | (
        {"gpus": ", ".join(gpus)} if (gpus := hardware.gpus()) else {}
    )
    found |= {name: metadata.version(name) for name in packages}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["flash-attn-4"] = metadata.version("flash-attn-4")  # computes attention where it is there
    return found


def _hash(record: Record) -> str:
    return hash_bytes(msgspec.json.encode(msgspec.structs.replace(record, hash="")))


def _encode(record: Record) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def write(stage: Stage, record: Record) -> Record:
    """Replace the record of its attempt."""
    record = msgspec.structs.replace(record, hash="")
    record = msgspec.structs.replace(record, hash=_hash(record))
    stage.replace(stage.paths.attempt(record.attempt) / RECORD, _encode(record))
    return record


def _remedy(path: Path) -> str:
    return f" Move {path.parent} aside to continue from the attempt before it."


def read(paths: RunPaths, attempt: int) -> Record:
    """Raises: Damaged."""
    path = paths.attempt(attempt) / RECORD
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path} cannot be read ({error}).{_remedy(path)}") from None
    try:
        return decode(data, str(path))
    except Damaged as error:
        raise Damaged(f"{error}{_remedy(path)}") from None


def decode(data: bytes, path: str) -> Record:
    """A record from its bytes; `path` says whose they are. Raises: Damaged."""
    try:
        record = msgspec.json.decode(data, type=Record)
    except (UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise Damaged(f"{path} cannot be read ({error}).") from None
    if _hash(record) != record.hash or _encode(record) != data:
        raise Damaged(
            f"{path} is damaged: it states hash {record.hash}, its content hashes to {_hash(record)}."
        )
    return record


def numbers(paths: RunPaths) -> list[int]:
    """The attempts that were begun: those with a record."""
    if not paths.attempts.exists():
        return []
    named = [name for name in os.listdir(paths.attempts) if name.isdigit()]
    return sorted(int(name) for name in named if (paths.attempts / name / RECORD).exists())


def newest(paths: RunPaths) -> Record | None:
    """The newest attempt's record, or None in a directory without a run. Raises: Damaged."""
    known = numbers(paths)
    return read(paths, known[-1]) if known else None


def read_config(paths: RunPaths, record: Record) -> Any:
    """The resolved configuration of an attempt, as the class of its kind. Raises: Damaged, Refusal."""
    path = paths.attempt(record.attempt) / "run.toml"
    found = hash_bytes(path.read_bytes()) if path.exists() else "nothing"
    if found != record.config_xxh3:
        raise Damaged(f"{path} is damaged: expected xxh3 {record.config_xxh3}, found {found}.{_remedy(path)}")
    return config_io.from_toml(KINDS[record.kind], path)


def is_gone(paths: RunPaths) -> bool:
    """Whether the launcher that held a run last has ended, as far as this machine can tell: it was one of here."""
    try:
        words = paths.lock.read_text().split()
    except (OSError, UnicodeDecodeError):
        return False
    return words[:1] == ["pid"] and words[-1:] == [platform.node()] and not Path("/proc", words[1]).exists()


_NO_INPUTS = Inputs()


class Lock:
    """One launcher a directory: flock, released by the kernel however the launcher ends."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises: Refusal if another launcher holds the run."""
        file = self._paths.lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise Refusal(
                f"{self._paths.root} is in use by another launcher ({holder}): stop it first, "
                "or choose another --output-dir."
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Assignment:
    """What a program of a run needs to know; the same for a new run and a resumed one."""

    paths: RunPaths
    config: Any
    plan: Plan
    attempt: int
    run_id: str
    lineage: int
    stage: Stage
    inputs: Inputs = _NO_INPUTS
    """What the attempt's record says that the run reads."""

    @property
    def memory(self) -> RunPaths | None:
        """Where policies go through memory, on the trainer's machine; None if they do not."""
        return memory.find(self.config, self.run_id, self.attempt)


def token(attempt: int, role: str, incarnation: int) -> str:
    return f"{attempt:03d}.{role}.{incarnation}"


def join(root: Path, attempt: int, role: str, incarnation: int) -> Assignment:
    """Enter an open attempt as one of its programs, in the workshop that its launcher opened.

    It is not opened here: a process that is slow to start could so undo its own replacement.
    """
    paths = RunPaths(root)
    stage = Stage(paths, token(attempt, role, incarnation))
    stage.enter()
    record = read(paths, attempt)
    return Assignment(
        paths=paths,
        config=read_config(paths, record),
        plan=record.plan_of(role),
        attempt=attempt,
        run_id=record.run_id,
        lineage=record.lineage,
        stage=stage,
        inputs=Inputs() if record.inputs is msgspec.UNSET else record.inputs,
    )


def argv() -> list[str]:
    """The command as the user typed it, without the path of the program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
