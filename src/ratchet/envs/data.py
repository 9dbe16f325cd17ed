"""Rows of an environment: .jsonl or .parquet, relative to the working directory, each with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ratchet.errors import Refusal

Row = dict[str, Any]
Check = Callable[[Row], str | None]


def read_rows(path: str, check: Check) -> list[Row]:
    """The rows of a file, each accepted by `check`, which returns what is wrong with one.

    Raises: Refusal with file and line (.parquet: row) for the first row that is not well-formed.
    """
    file = Path(path)
    if not file.is_file():
        raise Refusal(
            f"There is no data file {path} (looked in {Path.cwd()}): correct the path; "
            "it is relative to the directory in which the command is run."
        )
    if file.suffix == ".jsonl":
        rows = _read_jsonl(file)
    elif file.suffix == ".parquet":
        rows = _read_parquet(file)
    else:
        raise Refusal(f"{path} is neither .jsonl nor .parquet: convert it to one of them.")
    if not rows:
        raise Refusal(f"{path} has no rows: an environment needs at least one task.")
    for place, row in rows:
        if (wrong := check(row)) is not None:
            raise Refusal(f"{place}: {wrong}.")
    return [row for _, row in rows]


def _read_jsonl(file: Path) -> list[tuple[str, Row]]:
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(f"{file}, line {number}: not valid JSON ({error}).") from None
        if not isinstance(row, dict):
            raise Refusal(f"{file}, line {number}: a row must be a JSON object.")
        rows.append((f"{file}, line {number}", row))
    return rows


def _read_parquet(file: Path) -> list[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{file} cannot be read as parquet: {error}.") from None
    return [(f"{file}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def missing_text(row: Row, key: str) -> str | None:
    """What is wrong with a row that must have a non-empty text under `key`."""
    value = row.get(key)
    if isinstance(value, str) and value:
        return None
    found = "it is missing" if key not in row else f"it is {value!r}"
    return f"`{key}` must be a non-empty text; {found}"
