"""Follow a metric file that grows, and that is replaced by a shorter one where a run goes back."""

import itertools
import os
from pathlib import Path

import msgspec

from ratchet.metrics import Row


class Tail:
    """The rows of one metric file, read as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0
        self.rows: list[Row] = []

    def look(self) -> list[Row]:
        """Read on; returns the rows at the end that were not there at the last look.

        A replaced file is read again from its beginning: rows that it shares with the old one are not new.
        """
        before: list[Row] = []
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    before, self.rows = self.rows, []
                    self._inode, self._offset = stat.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        fresh = [row for line in whole.splitlines() if (row := _parse(line)) is not None]
        self.rows.extend(fresh)
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, fresh, strict=False))
        return fresh[sum(1 for _ in shared) :]


def _parse(line: bytes) -> Row | None:
    """None for a line that a power cut left torn: the next start makes it again."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
