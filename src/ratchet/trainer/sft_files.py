"""The rows of demonstrations, each with its place: from JSON, one a line or in an array, from Parquet, or the hub."""

import gzip
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ratchet import hub
from ratchet.config import DataConfig
from ratchet.errors import Refusal
from ratchet.log import LOGGER

T = TypeVar("T")
_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_READ = ", ".join((*_JSON, ".parquet"))
_OTHER = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".yaml", ".yml", ".pkl")
_FILES = (".json", ".jsonl", ".parquet", *_OTHER)
"""How the name of a file of data ends, which therefore no data set of the hub has."""
_SAID_EVERY_S = 5.0


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, as they are there."""

    name: str
    rows: Sequence[Any]
    lines: Sequence[int] | None = None
    """Where each of them is, if it is a line of a file."""

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where a row is, for people."""
        found = f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}"
        return f"{self.name}, {found}"


def is_file(name: str) -> bool:
    """Whether a name means a file here, there or not, rather than a data set of the hub."""
    return name.lower().endswith(_FILES) or hub.is_local(name)


def load_rows(data: DataConfig) -> Rows:
    """All rows, whatever is in them. Raises: Refusal with file and line where they cannot be parsed."""
    rows = _read(data)
    if not rows:
        raise Refusal(f"{data.name} has no rows.")
    return rows


def _read(data: DataConfig) -> Rows:
    path = Path(data.name)
    if not is_file(data.name):
        return Rows(data.name, _read_hub(data))
    if not path.is_file():
        raise Refusal(
            f"The data file {path} cannot be read (there is no such file in {Path.cwd()}): check data.name, which is "
            "relative to the directory in which the command is run."
        )
    if path.name.lower().endswith(_JSON):
        return _read_json(path)
    if path.suffix.lower() == ".parquet":
        return Rows(str(path), _read_parquet(path))
    raise Refusal(f"{path} is not one of {_READ}: convert it, or check data.name.")


def _open_refusal(path: Path, error: Exception | str) -> Refusal:
    return Refusal(f"The data file {path} cannot be read ({error}): check data.name.")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _open_refusal(path, error) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _open_refusal(path, f"line {line} is not UTF-8") from None


def _read_json(path: Path) -> Rows:
    text = _read_text(path)
    if ".jsonl" not in path.suffixes and text.lstrip()[:1] == "[":
        return Rows(str(path), _parse(text, str(path)))
    rows, lines = [], []
    every = text.split("\n")
    for number, line in enumerate(with_progress(every, len(every), f"reading {path}"), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}"))
            lines.append(number)
    return Rows(str(path), rows, lines)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # beside what is no JSON: numbers, and nesting, without end
        raise Refusal(f"{where} is not valid JSON: {error}.") from None


def _read_parquet(path: Path) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise _open_refusal(path, error) from None


def _read_hub(data: DataConfig) -> Sequence[Any]:
    from datasets import load_dataset

    try:
        return load_dataset(data.name, split=data.split)  # pyright: ignore[reportReturnType]
    except Exception as error:  # the library raises many kinds for a name that does not exist
        raise Refusal(f"The data set {data.name} ({data.split}) cannot be loaded: {error}.") from None


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The same items; how far it is, is said where that takes long."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if done % 1024 == 0 and time.monotonic() - said > _SAID_EVERY_S:
            LOGGER.info("%s: %d of %d rows", what, done, total)
            said = time.monotonic()
        yield item
