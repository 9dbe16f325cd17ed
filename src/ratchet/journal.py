"""Finished rollouts that are in no batch yet: a rollout that was finished is never generated twice.

    append ─► (one write a tick) ─► journal/<token>-<n>.log ─► trim, once every draw in it is settled
                                              └─► find, by the process that comes after a crash

A segment is a magic line and frames: length, CRC-32 of the length, payload, xxh3-64 of the payload. An empty
frame ends a segment that was left for the next one. Only the newest segment of a process may lack its end.

Crash: a write that returned survives the process; it survives the machine after the next `sync`.
"""

import re
import struct
import zlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from ratchet import durable
from ratchet.errors import Damaged
from ratchet.paths import RunPaths
from ratchet.records import RolloutFailure, Sample
from ratchet.stage import Stage

MAGIC = b"ratchet journal 1\n"
SEGMENT_BYTES = 4 << 20
SYNC_S = 1.0
_LENGTH = struct.Struct("<I")
_CRC_BYTES = 4
_HEAD_BYTES = _LENGTH.size + _CRC_BYTES
_HASH_BYTES = 8
_NAME = re.compile(r"((\d+)\.\w+\.(\d+))-(\d+)\.log")


class RolloutId(NamedTuple):
    """Which rollout it is, whoever plays it: the place that its seeds are derived from."""

    env: str
    draw: int
    rollout: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One finished rollout: a sample without its advantage, or the reason why there is none."""

    env: str
    draw: int
    rollout: int
    key: str
    """Digest of everything configured that made it; under another key it is worth nothing."""
    policy: str
    """The policy that the server held when it was finished, by its full name."""
    sample: Sample | None = None
    failure: RolloutFailure | None = None

    @property
    def id(self) -> RolloutId:
        return RolloutId(self.env, self.draw, self.rollout)

    @property
    def outcome(self) -> Sample | RolloutFailure:
        outcome = self.sample or self.failure
        assert outcome is not None
        return outcome


_DECODER = msgspec.msgpack.Decoder(Entry)
_ENCODER = msgspec.msgpack.Encoder()


def digest(value: Any) -> str:
    """The key of a configuration, given as plain data."""
    return durable.hash_bytes(msgspec.json.encode(value, order="deterministic"))


def frame(payload: bytes) -> bytes:
    length = _LENGTH.pack(len(payload))
    return b"".join((length, _crc(length), payload, _hash(payload)))


def _crc(length: bytes) -> bytes:
    return zlib.crc32(length).to_bytes(_CRC_BYTES, "little")


def _hash(payload: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(payload).to_bytes(_HASH_BYTES, "little")


def segments(paths: RunPaths) -> list[Path]:
    """The segments that exist, oldest process and segment first."""
    if not paths.journal.exists():
        return []
    named = [(m, p) for p in paths.journal.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [p for m, p in sorted(named, key=lambda item: tuple(int(item[0][i]) for i in (2, 3, 4)))]


def _process_of(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match[1]


def read(path: Path, *, is_newest: bool) -> list[Entry]:
    """The entries of one segment; every byte is checked before any is returned.

    The newest segment of a process may end in a torn frame, which never counted. Raises: Damaged.
    """
    entries = []
    for offset, payload in _frames(path, path.read_bytes(), is_newest=is_newest):
        try:
            entries.append(_DECODER.decode(payload))
        except msgspec.MsgspecError as error:
            raise _damaged(path, offset, f"the entry does not parse ({error})") from None
    return entries


def _frames(path: Path, data: bytes, *, is_newest: bool) -> Iterator[tuple[int, bytes]]:
    """The whole frames of a segment with their offsets. Raises: Damaged."""
    if not data.startswith(MAGIC):
        if not (is_newest and _is_unfilled(MAGIC, data, b"")):
            raise _damaged(path, 0, "it does not begin as a segment does")
        return
    offset = len(MAGIC)
    while offset < len(data):
        payload = _payload(path, data, offset)
        if payload is None:
            if is_newest:
                return
            raise _damaged(path, offset, "it is cut there")
        end = offset + _HEAD_BYTES + len(payload) + _HASH_BYTES
        if not payload:
            if end < len(data):
                raise _damaged(path, end, "there are bytes after its end")
            return
        yield offset, payload
        offset = end
    if not is_newest:
        raise _damaged(path, offset, "its end is missing")


def _payload(path: Path, data: bytes, offset: int) -> bytes | None:
    """The payload of the frame at `offset`; None for a torn tail. Raises: Damaged."""
    body = offset + _HEAD_BYTES
    if body > len(data):
        return None
    length, crc = data[offset : offset + _LENGTH.size], data[offset + _LENGTH.size : body]
    if crc != _crc(length):
        if _is_unfilled(_crc(length), crc, data[body:]):
            return None
        raise _damaged(path, offset, "the length of the entry does not match its CRC")
    end = body + _LENGTH.unpack(length)[0]
    if end + _HASH_BYTES > len(data):
        return None
    payload, expected = data[body:end], data[end : end + _HASH_BYTES]
    found = _hash(payload)
    if expected != found:
        if _is_unfilled(found, expected, data[end + _HASH_BYTES :]):
            return None
        said = f"expected xxh3 {expected[::-1].hex()} of the entry, found {found[::-1].hex()}"
        raise _damaged(path, offset, said)
    return payload


def _is_unfilled(whole: bytes, found: bytes, rest: bytes) -> bool:
    """Whether only the beginning of `whole` was written, and what was allocated for the rest is zeros.

    A power cut leaves that of an append; the last bytes of the frame would else be those of its hash.
    """
    return whole.startswith(found.rstrip(b"\0")) and not any(rest)


def _damaged(path: Path, offset: int, why: str) -> Damaged:
    return Damaged(f"{path} is damaged at byte {offset}: {why}.")


def _read_all(paths: RunPaths) -> Iterator[tuple[Path, list[Entry] | Damaged]]:
    found = segments(paths)
    newest = {_process_of(path): path for path in found}
    for path in found:
        try:
            yield path, read(path, is_newest=newest[_process_of(path)] == path)
        except FileNotFoundError:
            continue  # trimmed meanwhile, by a process that is alive
        except Damaged as error:
            yield path, error


def damaged(paths: RunPaths) -> dict[str, str]:
    """The segments that must not be used, by name, each with the file, the offset and what is wrong there."""
    return {path.name: str(found) for path, found in _read_all(paths) if isinstance(found, Damaged)}


class Journal:
    """One process's hand on the journal. Verbs: restore / find, append / write / sync, release / trim.

    `sync` and `trim` may run in a thread beside the others.
    """

    def __init__(self, stage: Stage, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._stage = stage
        self._limit_bytes = segment_bytes
        self._found: dict[RolloutId, Entry] = {}
        self._draws: dict[Path, set[int]] = {}
        self._pending: list[Entry] = []
        self._live: Path | None = None
        self._size_bytes = 0
        self._number = 0
        self._unsynced: set[Path] = set()

    def restore(self, unsettled: Container[int]) -> None:
        """Read what older processes finished; entries of draws that are settled are ignored.

        Raises: Damaged, before anything is used.
        """
        for path, entries in list(_read_all(self._stage.paths)):
            if isinstance(entries, Damaged):
                raise entries
            self._draws[path] = {entry.draw for entry in entries}
            self._found |= {entry.id: entry for entry in entries if entry.draw in unsettled}

    def find(self, rollout: RolloutId) -> Entry | None:
        """The newest entry of a rollout. It is given out once; its segment keeps it."""
        return self._found.pop(rollout, None)

    def append(self, entry: Entry) -> None:
        """Take an entry; it counts when `write` returns."""
        self._pending.append(entry)

    def write(self) -> None:
        """Hand what was appended to the operating system. Raises: Fenced, OSError."""
        entries, self._pending = self._pending, []
        if not entries:
            return
        data = b"".join(frame(_ENCODER.encode(entry)) for entry in entries)
        live = self._segment()
        self._draws[live].update(entry.draw for entry in entries)
        durable.crash_point("journal.before_append")
        self._stage.extend(live, data)
        durable.crash_point("journal.after_append")
        self._size_bytes += len(data)
        self._unsynced.add(live)

    def _segment(self) -> Path:
        """The segment to write to: the live one, or a new one where that is full."""
        if self._live is not None and self._size_bytes >= self._limit_bytes:
            self._stage.extend(self._live, frame(b""))
            # Before its successor has a name: else a power cut could leave an older segment without its end.
            durable.fsync_path(self._live)
            self._live = None
        if self._live is None:
            self._number += 1
            live = self._stage.paths.journal / f"{self._stage.token}-{self._number}.log"
            self._stage.create(live, MAGIC)
            self._live, self._size_bytes = live, len(MAGIC)
            self._draws[live] = set()
        return self._live

    def sync(self) -> None:
        """Make what was written survive the machine."""
        paths, self._unsynced = self._unsynced, set()
        for path in paths:
            try:
                durable.fsync_path(path)
            except FileNotFoundError:
                continue  # trimmed meanwhile
        if paths:
            durable.fsync_path(self._stage.paths.journal)

    def release(self, unsettled: Container[int]) -> list[Path]:
        """Let go of the segments in which every draw is settled; they are to be trimmed."""
        gone = [path for path, draws in self._draws.items() if not any(d in unsettled for d in draws)]
        for path in gone:
            del self._draws[path]
            if path == self._live:
                self._live = None
        return gone

    def trim(self, released: Iterable[Path]) -> None:
        """Delete whole segments. Raises: Fenced."""
        for path in released:
            durable.crash_point("journal.before_trim")
            self._stage.remove(path)
