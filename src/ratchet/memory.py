"""Shared memory of the trainer's machine as a way for policies: a cache in front of weights/, never in place of it.

    <weights.memory_dir>/ratchet-<uid>-<run id>/owner                  locked by the launcher while it lives
                                               /<attempt>/weights/     as in the run directory: sealed, renamed
                                               /<attempt>/staging/     workshops of its trainers

Nothing there outlives an attempt: a trainer that begins at a checkpoint makes the same policies again from the log.

There is one fence for both. A workshop here is reached through a link in the one of the run directory, so the rename
that revokes a process takes this way too, in the same instant.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ratchet import durable
from ratchet.config import RLConfig, RunConfig, WeightsConfig
from ratchet.errors import RatchetError, Refusal
from ratchet.paths import RunPaths
from ratchet.stage import GATE, Stage

OWNER = "owner"
_LINK = "memory"


def _own(base: Path, run_id: str) -> Path:
    return base / f"ratchet-{os.getuid()}-{run_id}"


def find(config: RunConfig, run_id: str, attempt: int) -> RunPaths | None:
    """Where the policies of an attempt lie in memory, by name; None if they do not go that way."""
    return _find(config.weights, run_id, attempt) if isinstance(config, RLConfig) else None


def find_by(settings: Mapping[str, Any], run_id: str, attempt: int) -> RunPaths | None:
    """The same from a configuration as its file states it."""
    return _find(WeightsConfig.model_validate(settings.get("weights", {})), run_id, attempt)


def _find(weights: WeightsConfig, run_id: str, attempt: int) -> RunPaths | None:
    if weights.transport != "memory":
        return None
    return RunPaths(_own(weights.memory_dir, run_id) / f"{attempt:03d}")


def outlives(config: RLConfig, step: int) -> bool:
    """Whether policy `step` is published on the disk too, where policies go through memory.

    Those of every interval, and those without which a resume would not end the same: the initial and the last one, one
    that is to be evaluated, and those that sample the first batches after a checkpoint.
    """
    if step % config.weights.publish_interval == 0 or step in (0, config.max_steps):
        return True
    evaluation = config.orchestrator.eval
    if evaluation is not None and evaluation.is_due(step, config.max_steps):
        return True
    after = range(step, min(step + config.ahead, config.max_steps) + 1)
    return config.ckpt is not None and any(config.ckpt.is_due(s, config.max_steps) for s in after)


class Memory:
    """A run's part of the shared memory, held by its launcher from the opening of an attempt to its end."""

    def __init__(self, root: Path, owner: IO[bytes]) -> None:
        self._root = root
        self._owner = owner

    @classmethod
    def open(cls, config: RunConfig, run_id: str, attempt: int) -> "Memory | None":
        """Make it, empty; None if no policy goes that way. What an attempt before this one left goes in any case.

        Raises: Refusal if it cannot be made.
        """
        if not isinstance(config, RLConfig):
            return None
        root = _own(config.weights.memory_dir, run_id)
        paths = find(config, run_id, attempt)
        try:
            if root.exists():
                shutil.rmtree(root)
            if paths is None:
                return None
            root.mkdir()
            owner = (root / OWNER).open("xb")
            fcntl.flock(owner, fcntl.LOCK_EX)
            _make(paths)
        except OSError as error:
            raise Refusal(
                f"{root} cannot be made ({error.strerror}): choose another weights.memory_dir, or set "
                "weights.transport = 'filesystem'."
            ) from None
        return cls(root, owner)

    @staticmethod
    def sweep(config: RunConfig, run_id: str) -> None:
        """Let go of what a dead attempt of these settings left, wherever the next one may go: the room is needed to
        judge whether there is room."""
        if isinstance(config, RLConfig):
            shutil.rmtree(_own(config.weights.memory_dir, run_id), ignore_errors=True)

    def close(self) -> None:
        """Let go of everything: whoever still reads falls back on the disk."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._owner.close()


def _make(paths: RunPaths) -> None:
    for directory in (paths.weights, paths.staging):
        directory.mkdir(parents=True, exist_ok=True)


def leftovers(base: Path) -> Iterator[Path]:
    """The parts of runs of this user below `base` that nobody holds any more: their launcher was killed."""
    for root in sorted(base.glob(f"ratchet-{os.getuid()}-*")):
        try:
            with (root / OWNER).open("rb") as owner:
                fcntl.flock(owner, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except FileNotFoundError:
            pass  # it was killed before it held anything
        yield root


class MemoryStage(Stage):
    """The workshop of a trainer in memory. What ends its workshop in the run directory ends this one."""

    def __init__(self, paths: RunPaths, disk: Stage) -> None:
        super().__init__(paths, disk.token)
        self._disk = disk

    @classmethod
    def join(cls, paths: RunPaths, disk: Stage) -> "MemoryStage":
        """Begin here, as the one trainer of the attempt: workshops of those before it go. Raises: Fenced"""
        disk.check()
        _make(paths)  # a machine may have swept its shared memory
        for name in os.listdir(paths.staging):
            shutil.rmtree(paths.staging / name, ignore_errors=True)
        stage = cls(paths, disk)
        stage.directory.mkdir()
        try:
            (disk.directory / GATE / ".." / _LINK).symlink_to(stage.directory.absolute())
        except FileNotFoundError:
            disk.check()
            raise
        return stage

    def check(self) -> None:
        """Raises: Fenced if this process was replaced; RatchetError if the memory was swept; Unwritable"""
        self._disk.check()
        if not self.directory.exists():
            raise RatchetError(
                f"{self.directory} is gone: something on this machine removes files there (systemd at the logout of "
                "their owner: `loginctl enable-linger`), or choose another weights.memory_dir."
            )

    def _inside(self, path: Path) -> Path:
        return self._disk.directory / GATE / ".." / _LINK / path.relative_to(self.directory)

    def withdraw(self, path: Path) -> Path | None:
        """Take a published directory back: nobody finds it any more. Returns where it is; None if it was gone."""
        place = self.directory / f"{next(self._numbers)}-old"
        try:
            os.rename(path, self._inside(place))
        except FileNotFoundError:
            self.check()
            return None
        durable.crash_point("remove.after_rename")
        return place

    def hand_on(self, path: Path, target: Path) -> None:
        """Give a file of this workshop another name in it. Raises: Fenced"""
        try:
            os.rename(path, self._inside(target))
        except FileNotFoundError:
            self.check()
            raise
