"""Metric rows: flat JSON objects, one a step, appended to metrics/<role>.jsonl.

`step` is the policy that the row's step produced (1..N). Names are `area/quantity`; whatever a clock or a
fault touches is under `time/`, `perf/` or `fault/` and is exempt from the exactness contract.
"""

from pathlib import Path
from typing import Any

import msgspec

from ratchet.durable import Stage, hash_bytes

EXEMPT = ("time/", "perf/", "fault/")

Row = dict[str, Any]


def exact(row: Row) -> Row:
    """The part of a row that must be the same in every repetition of a deterministic run."""
    return {key: value for key, value in row.items() if not key.startswith(EXEMPT)}


def append(stage: Stage, path: Path, row: Row) -> None:
    """Add one row. The launcher's display and the trackers follow this file."""
    stage.append(path, msgspec.json.encode(row) + b"\n")


def read(path: Path) -> list[Row]:
    """All whole rows; a torn last line is not a row."""
    if not path.exists():
        return []
    return [msgspec.json.decode(line) for line in _whole_lines(path.read_bytes())]


def _whole_lines(data: bytes) -> list[bytes]:
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def rewind(stage: Stage, path: Path, step: int) -> list[Row]:
    """Cut the rows past `step`, so that a curve is continued without a gap or a double point.

    The file is always replaced: an older process that still holds the old one open cannot add to this one.
    Returns the rows that were cut.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = _whole_lines(data)
    rows = [msgspec.json.decode(line) for line in lines]
    keep = sum(len(line) for line, row in zip(lines, rows, strict=True) if row["step"] <= step)
    stage.replace(path, data[:keep])
    return [row for row in rows if row["step"] > step]


def lines_until(path: Path, step: int) -> bytes:
    """The rows up to `step`, byte for byte."""
    lines = _whole_lines(path.read_bytes()) if path.exists() else []
    return b"".join(line for line in lines if msgspec.json.decode(line)["step"] <= step)


def mark(path: Path) -> dict[str, Any]:
    """Length and hash of the rows so far: a checkpoint records them just before it commits."""
    data = path.read_bytes() if path.exists() else b""
    return {"bytes": len(data), "xxh3": hash_bytes(data), "rows": data.count(b"\n")}
