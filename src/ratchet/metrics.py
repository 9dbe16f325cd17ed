"""Metric rows: flat JSON objects, one a step, appended to metrics/<role>.jsonl.

`step` is the policy that the row's step produced (1..N). Names are `area/quantity`; whatever a clock or a
fault touches is under `time/`, `perf/` or `fault/` and is exempt from the exactness contract.
"""

from pathlib import Path
from typing import Any

import msgspec

from ratchet.durable import fsync_path, hash_bytes
from ratchet.stage import Stage

EXEMPT = ("time/", "perf/", "fault/")

Row = dict[str, Any]


def exact(row: Row) -> Row:
    """The part of a row that must be the same in every repetition of a deterministic run."""
    return {key: value for key, value in row.items() if not key.startswith(EXEMPT)}


def append(stage: Stage, path: Path, row: Row, *, flush: bool = False) -> None:
    """Add one row. The launcher's display and the trackers follow this file.

    `flush` where the row may outlive what it was made from: nothing else can bring it back after a power cut.
    """
    stage.append(path, msgspec.json.encode(row) + b"\n")
    if flush:
        fsync_path(path)


def read(path: Path) -> list[Row]:
    """All whole rows, up to the first that is not."""
    return [row for _, row in _whole(path)]


def _whole(path: Path) -> list[tuple[bytes, Row]]:
    """The lines and their rows, up to the first torn one: a power cut may also leave zeros, and rows behind them."""
    data = path.read_bytes() if path.exists() else b""
    found = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            found.append((line, msgspec.json.decode(line)))
        except msgspec.DecodeError:
            break
    return found


def rewind(stage: Stage, path: Path, step: int) -> list[Row]:
    """Cut the rows past `step`, so that a curve is continued without a gap or a double point.

    The file is always replaced: an older process that still holds the old one open cannot add to this one.
    Returns the rows that were cut.
    """
    if not path.exists():
        return []
    found = _whole(path)
    stage.replace(path, b"".join(line for line, row in found if row["step"] <= step))
    return [row for _, row in found if row["step"] > step]


def lines_until(path: Path, step: int) -> bytes:
    """The rows up to `step`, byte for byte."""
    return b"".join(line for line, row in _whole(path) if row["step"] <= step)


def mark(path: Path) -> dict[str, Any]:
    """Length and hash of the rows so far: a checkpoint records them just before it commits."""
    data = path.read_bytes() if path.exists() else b""
    return {"bytes": len(data), "xxh3": hash_bytes(data), "rows": data.count(b"\n")}
