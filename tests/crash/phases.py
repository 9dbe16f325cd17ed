"""The phases of a run in which it is killed: what stands on the disk, and the command that finds it."""

import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import points

from ratchet import digest
from ratchet.audit import audit
from ratchet.paths import RunPaths

STEPS = 7
FLAGS = ("--ckpt.interval", "2", "--ckpt.keep-last", "2")
KEEP_ALL = ("--ckpt.interval", "2")


def finish(toys, root, *flags, steps=STEPS, is_counted=False):
    """Run a command to its end, in which everything is in order."""
    done = toys.run(root, *flags, steps=steps, is_counted=is_counted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert audit(RunPaths(root)).findings == []
    return done


def kill(toys, root, *flags, at):
    """Run a command until it dies at a durable point."""
    died = toys.run(root, *flags, steps=STEPS, crash_at=at)
    assert died.returncode == -signal.SIGKILL, f"{at} was not reached: {died.stderr}"


@dataclass(frozen=True)
class Phase:
    """`prepare` makes what the command with `flags` finds."""

    prepare: Callable
    flags: tuple[str, ...] = FLAGS


PHASES = {
    points.FRESH: Phase(lambda toys, root, *more: None),
    points.RESUME: Phase(
        lambda toys, root, *more: finish(toys, root, *FLAGS, *more, steps=4),
        (*FLAGS, "--ckpt.resume-step", "4"),
    ),
    points.REPLAY: Phase(lambda toys, root, *more: kill(toys, root, *FLAGS, *more, at="batch.committed:5")),
    points.ROLLBACK: Phase(
        lambda toys, root, *more: finish(toys, root, *KEEP_ALL, *more), (*FLAGS, "--ckpt.resume-step", "2")
    ),
}


@dataclass(frozen=True)
class Calm:
    """A phase in which nobody dies: the folder that it starts from, how often it passes each point, how it ends."""

    start: Path
    root: Path
    passages: Counter
    parts: dict


def calm(toys, phase, start, whole, more=()):
    """Go through a phase, in two new folders; `more` are flags of every command."""
    PHASES[phase].prepare(toys, start / "run", *more)
    root = shutil.copytree(start, whole, symlinks=True) / "run"
    passages = finish(toys, root, *PHASES[phase].flags, *more, is_counted=True).passages
    return Calm(start, root, passages, digest.parts(root))
