"""How bytes become true: hashes, manifests, and what counts as committed. `stage` is who writes.

A directory is *published* by this order, and each step is needed:

    write into staging/<token>/x      nobody looks there
    fsync and hash every file         the bytes are on the disk before anything names them
    write and fsync MANIFEST.json     names, sizes, hashes; it hashes itself
    fsync the directories             the names are on the disk
    rename to the final name          the commit: one atomic step
    fsync the parent                  the commit survives a power cut
"""

import ctypes
import errno
import hashlib
import io
import itertools
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from ratchet.errors import Damaged, Refusal
from ratchet.paths import parse_step
from ratchet.records import FileEntry, Manifest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MANIFEST = "MANIFEST.json"
FORMAT = 1
_PIECE_BYTES = 256 << 10
"""What is written at a time: little enough to be hashed from the processor's cache."""
_BEHIND_BYTES = 16 << 20
"""How much is written before the disk is told to begin with it."""
_SYNC_FILE_RANGE_WRITE = 2
_crash_at = os.environ.get("RATCHET_CRASH_AT", "")
_crash_seen: dict[str, int] = {}


def crash_point(name: str) -> None:
    """A named instant at which a test may kill this process: RATCHET_CRASH_AT=<name>:<n>."""
    if not _crash_at:
        return
    wanted, _, count = _crash_at.rpartition(":")
    if wanted == name:
        _crash_seen[name] = _crash_seen.get(name, 0) + 1
        if _crash_seen[name] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_bytes(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def start_writing(descriptor: int, start: int, size_bytes: int) -> None:
    """Let the disk begin with a part of a file. Nothing waits for it, and its errors are those of the next fsync."""
    call = ctypes.CDLL(None).sync_file_range
    call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)


class SealedFile(io.FileIO):
    """A new file that is sealed while it is written: hashed on the way, the disk at work before its end.

    `seal` does the same to files that are there, but reads them back, and begins when the last byte is written.
    Crash: a part of the bytes; all of them are on the disk once `close` has returned.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self._hasher = xxhash.xxh3_128()
        self._size_bytes = 0
        self._handed_bytes = 0

    def seekable(self) -> bool:
        """Bytes follow each other: a hash cannot go back."""
        return False

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write the beginning of `data`, of which the caller writes the rest, as for any unbuffered file."""
        piece = memoryview(data).cast("B")[:_PIECE_BYTES]
        written = super().write(piece)
        self._hasher.update(piece[:written])
        self._size_bytes += written
        new_bytes = self._size_bytes - self._handed_bytes
        if new_bytes >= _BEHIND_BYTES:
            start_writing(self.fileno(), self._handed_bytes, new_bytes)
            self._handed_bytes = self._size_bytes
        return written

    def close(self) -> None:
        if self.closed:
            return
        try:
            os.fsync(self.fileno())
        finally:
            super().close()

    def entry(self, name: str) -> FileEntry:
        """What a manifest says of this file, once it is closed."""
        return FileEntry(name=name, size=self._size_bytes, xxh3=self._hasher.hexdigest())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that is sealed already onto a disk, which is at work before the last byte is written.

    Crash: a part of the bytes; all of them are on the disk once this returns.
    """
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        start, size_bytes = 0, os.fstat(old.fileno()).st_size
        while start < size_bytes:
            sent = os.sendfile(new.fileno(), old.fileno(), start, _BEHIND_BYTES)
            if sent == 0:
                raise Damaged(f"{source} became shorter while it was copied.")
            start_writing(new.fileno(), start, sent)
            start += sent
        os.fsync(new.fileno())


def seal(directory: Path, names: Iterable[str] | None = None) -> list[FileEntry]:
    """Fsync and hash the files of a staged directory: all of them, or one rank's own.

    Returns the entries sorted by name, which is relative to `directory`.
    """
    if names is None:
        names = (str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    entries = []
    for name in sorted(names):
        path = directory / name
        fsync_path(path)
        entries.append(FileEntry(name=name, size=path.stat().st_size, xxh3=hash_file(path)))
    return entries


def payload_digest(files: Iterable[FileEntry]) -> str:
    """One digest for a set of files: names and contents, nothing else."""
    return hash_bytes(msgspec.json.encode([(f.name, f.xxh3) for f in sorted(files)]))


def _manifest_hash(manifest: Manifest) -> str:
    return hash_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, hash="")))


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest: a reader accepts these and no others, so that every byte counts."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def read_manifest(directory: Path) -> Manifest:
    """Read and check one manifest.

    Raises: Damaged if it is missing, does not parse, or does not hash to what it says.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{directory} has no {MANIFEST}: it was never committed.") from None
    manifest = decode_manifest(data, str(path))
    named = parse_step(directory.name)
    if named is not None and named != manifest.step:
        raise Damaged(f"{path} states step {manifest.step}, its directory states {named}.")
    return manifest


def decode_manifest(data: bytes, path: str) -> Manifest:
    """A manifest from its bytes; `path` says whose they are. Raises: Damaged."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} does not parse ({error}): it is damaged.") from None
    if manifest.format > FORMAT:
        raise Damaged(
            f"{path} has format {manifest.format}; this version reads up to {FORMAT}: upgrade Ratchet."
        )
    found = _manifest_hash(manifest)
    if manifest.hash != found or encode_manifest(manifest) != data:
        raise Damaged(f"{path} is damaged: it states hash {manifest.hash}, its content hashes to {found}.")
    return manifest


def signed(manifest: Manifest) -> Manifest:
    """The manifest with its files in order and its own hash in it."""
    ordered = msgspec.structs.replace(manifest, files=tuple(sorted(manifest.files)))
    return msgspec.structs.replace(ordered, hash=_manifest_hash(ordered))


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """The cheap check: every file is there with its size. Raises: Damaged."""
    for entry in manifest.files:
        try:
            size = (directory / entry.name).stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{directory / entry.name} is missing; its manifest lists it.") from None
        if size != entry.size:
            raise Damaged(f"{directory / entry.name} has {size} bytes; its manifest says {entry.size}.")


def read_committed(directory: Path) -> Manifest | None:
    """The manifest of a published directory, or None where nothing sound stands under that name."""
    try:
        manifest = read_manifest(directory)
        check_sizes(directory, manifest)
    except Damaged:
        return None
    return manifest


def steps(root: Path) -> list[int]:
    """The steps that directories below `root` name, in order, sound or not."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(step for name in names if (step := parse_step(name)) is not None)


def committed(root: Path) -> dict[int, Manifest]:
    """The steps below `root` that count, in order. Resume, retention and display all ask here."""
    found = ((step, read_committed(root / f"step_{step}")) for step in steps(root))
    return {step: manifest for step, manifest in found if manifest is not None}


def newest_committed(root: Path, count: int) -> list[int]:
    """The newest `count` of the steps below `root` that count, in order; those before them are not read."""
    sound = (step for step in reversed(steps(root)) if read_committed(root / f"step_{step}") is not None)
    return sorted(itertools.islice(sound, count))


def verify(directory: Path) -> Manifest:
    """Read every byte and compare with the manifest.

    Raises: Damaged with the file, the expected and the found hash.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    check_hashes(directory, manifest.files)
    return manifest


def check_hashes(directory: Path, files: Iterable[FileEntry]) -> None:
    """Read these files of a published directory. Raises: Damaged with the file, the expected and the found hash."""
    for entry in files:
        found = hash_file(directory / entry.name)
        if found != entry.xxh3:
            raise Damaged(f"{directory / entry.name} is damaged: expected xxh3 {entry.xxh3}, found {found}.")


def put(path: Path, data: bytes) -> None:
    """Put a file in place of its older version that no program reads: a report. Whole or not at all; not flushed."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_bytes(data)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory outside any run, filled in the body, that appears under its name only when it is complete.

    Raises: Refusal if the name is taken.
    Crash: what was written so far lies beside the target under `.<name>.<pid>`.
    """
    if target.exists():
        raise Refusal(f"{target} exists already: choose a name that is free.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{target.name}.{os.getpid()}"
    staged.mkdir()
    try:
        yield staged
        for path in staged.rglob("*"):
            fsync_path(path)
        fsync_path(staged)
        os.rename(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    fsync_path(target.parent)


def link_tree(source: Path, target: Path) -> None:
    """Copy a published directory without its bytes, where the file system has hard links: it is immutable."""
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)
