"""What the `ckpt` commands have in common: a run is named, and the answer is said to a person or to a program."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from ratchet import durable
from ratchet.errors import Refusal
from ratchet.paths import RunPaths


def check_run(root: Path) -> RunPaths:
    """Raises: Refusal if there is no run."""
    if not (root / "attempts").is_dir():
        raise Refusal(f"{root} is not a run directory: it has no attempts/.")
    return RunPaths(root)


def check_step(paths: RunPaths, step: int) -> None:
    """Raises: Refusal if there is no sound checkpoint of `step`."""
    there = list(durable.committed(paths.checkpoints))
    if step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise Refusal(f"{paths.root} has no sound checkpoint of step {step}; there are: {known}.")


def say(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """Write `value` as one line of JSON, or the lines."""
    text = msgspec.json.encode(value).decode() if as_json else "\n".join(lines)
    sys.stdout.write(text + "\n")


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
