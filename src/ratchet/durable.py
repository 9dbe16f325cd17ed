"""How bytes become true. The only file that renames, fsyncs or deletes.

A directory is *published* by this order, and each step is needed:

    write into staging/<token>/x      nobody looks there
    fsync and hash every file         the bytes are on the disk before anything names them
    write and fsync MANIFEST.json     names, sizes, hashes; it hashes itself
    fsync the directories             the names are on the disk
    rename to the final name          the commit: one atomic step
    fsync the parent                  the commit survives a power cut

The rename is also the fence: a process is revoked by renaming its staging/<token> away, after which
whatever it still tries fails with ENOENT and becomes `Fenced`. Every way leads through a gate inside the workshop, as
staging/<token>/gate/../<path>: the kernel looks it up anew each time, and a library that makes missing directories
(torch's writer of checkpoints does) would bring back the workshop but never the gate.
"""

import errno
import itertools
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import msgspec
import xxhash

from ratchet.errors import Damaged, Fenced, RatchetError, Refusal, Unwritable
from ratchet.paths import RunPaths, parse_step
from ratchet.records import FileEntry, Manifest

MANIFEST = "MANIFEST.json"
GATE = "gate"
"""A directory that a workshop has from its opening until it is revoked; nothing is ever written into it."""
FORMAT = 1
_CHUNK_BYTES = 8 << 20
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
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


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
    for entry in manifest.files:
        found = hash_file(directory / entry.name)
        if found != entry.xxh3:
            raise Damaged(f"{directory / entry.name} is damaged: expected xxh3 {entry.xxh3}, found {found}.")
    return manifest


class Stage:
    """One process's private workshop, staging/<token>: whatever it publishes or deletes passes here."""

    current: "ClassVar[Stage | None]" = None
    """The one in which this process works: an error that it meets when that is gone is a consequence of it."""

    def __init__(self, paths: RunPaths, token: str) -> None:
        self.paths = paths
        self.token = token
        self.directory = paths.staging / token
        self._numbers = itertools.count(1)  # next() is atomic: a background save shares this workshop

    @classmethod
    def open(cls, paths: RunPaths, token: str) -> "Stage":
        """Make the workshop of a new incarnation; a token is never used twice."""
        stage = cls(paths, token)
        stage.directory.mkdir()
        (stage.directory / GATE).mkdir()
        fsync_path(paths.staging)
        return stage

    def open_for(self, token: str) -> "Stage":
        """Make the workshop of another process, one that this one starts. Raises: Fenced if this one was replaced."""
        stage = Stage(self.paths, token)
        try:
            self._through(stage.directory).mkdir()
            self._through(stage.directory / GATE).mkdir()
        except FileNotFoundError:
            self.check()
            raise
        fsync_path(self.paths.staging)
        return stage

    def leave(self) -> None:
        """Give up a workshop in which nothing is left."""
        (self.directory / GATE).rmdir()
        self.directory.rmdir()

    def enter(self) -> None:
        """This process works here from now on."""
        Stage.current = self

    def check(self) -> None:
        """Raises: Fenced if this process was replaced; Unwritable if the whole run directory is gone."""
        if (self.directory / GATE).exists():
            return
        if not self.paths.staging.exists():
            raise Unwritable(
                f"The run directory {self.paths.root} is gone (moved away, or its file system is not mounted): "
                "bring it back, then run the same command again."
            )
        raise Fenced(f"{self.token} was replaced by a newer process; it stops without publishing.")

    def _through(self, path: Path) -> Path:
        """The same place of the run, by a way that ends with the workshop."""
        return self.directory / GATE / ".." / ".." / ".." / path.relative_to(self.paths.root)

    def _inside(self, path: Path) -> Path:
        """The same place of the workshop, by a way that ends when it is revoked, whatever is made under its name."""
        return self.directory / GATE / ".." / path.relative_to(self.directory)

    def begin(self, name: str) -> Path:
        """A fresh directory to write into; its name is unique within this process."""
        directory = self.directory / f"{next(self._numbers)}-{name}"
        try:
            self._inside(directory).mkdir()
        except FileNotFoundError:
            self.check()
            raise
        return directory

    def commit(self, directory: Path, target: Path, manifest: Manifest) -> Manifest:
        """Publish a sealed directory under its final name.

        Raises: Fenced if this process was replaced; RatchetError if the name is taken by other content.
        Crash: before the rename nothing is visible; after it everything is.
        """
        manifest = signed(manifest)
        point = manifest.kind
        crash_point(f"{point}.before_manifest")
        path = directory / MANIFEST
        path.write_bytes(encode_manifest(manifest))
        fsync_path(path)
        for folder in {p.parent for p in directory.rglob("*")} | {directory}:
            fsync_path(folder)
        crash_point(f"{point}.before_rename")
        self._rename_new(directory, target, manifest)
        crash_point(f"{point}.after_rename")
        fsync_path(target.parent)
        crash_point(f"{point}.committed")
        return manifest

    def _rename_new(self, directory: Path, target: Path, manifest: Manifest) -> None:
        try:
            os.rename(self._inside(directory), target)
            return
        except FileNotFoundError:
            # A network filesystem may have retried a rename that succeeded.
            there = read_committed(target)
            if there is not None and there.hash == manifest.hash:
                return
            self.check()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            there = read_committed(target)
            if there is None or payload_digest(there.files) != payload_digest(manifest.files):
                raise RatchetError(
                    f"{target} is already published with other content; published names are never overwritten."
                ) from None
        shutil.rmtree(directory)

    def replace(self, path: Path, data: bytes) -> None:
        """Put a small file in place of its older version, atomically."""
        staged = self.directory / f"{next(self._numbers)}-{path.name}"
        try:
            staged.write_bytes(data)
        except FileNotFoundError:
            self.check()
            raise
        fsync_path(staged)
        crash_point(f"replace.{path.name}.before_rename")
        try:
            os.rename(self._inside(staged), path)
        except FileNotFoundError:
            self.check()
            raise
        self._settle(path.parent)

    def _settle(self, directory: Path) -> None:
        """Flush a directory and those above it, up to the run's: they may be new themselves."""
        for folder in (directory, *directory.parents):
            fsync_path(folder)
            if folder == self.paths.root:
                return

    def move(self, path: Path, target: Path) -> None:
        """Move a published name elsewhere in the run; a no-op where it has been moved already."""
        try:
            os.rename(self._through(path), self._through(target))
        except FileNotFoundError:
            self.check()
            return
        self._settle(target.parent)
        fsync_path(path.parent)

    def remove(self, path: Path) -> None:
        """Delete a published directory or file: it stops existing at once, its bytes go afterwards."""
        grave = self.directory / f"del-{next(self._numbers)}-{path.name}"
        try:
            os.rename(path, self._inside(grave))
        except FileNotFoundError:
            self.check()
            return
        crash_point("remove.after_rename")
        fsync_path(path.parent)
        if grave.is_dir():
            shutil.rmtree(grave)
        else:
            grave.unlink()

    def append(self, path: Path, data: bytes) -> None:
        """Append to a log of lines, such as metrics; `fsync_path` makes what was added survive the machine.

        Checked again after the opening: a process that is replaced after that writes into a file that its successor
        has already put another in place of (see `metrics.rewind`).
        """
        self.check()
        is_new = not path.exists()
        try:
            file = self._through(path).open("ab")
        except FileNotFoundError:
            self.check()
            raise
        with file:
            self.check()
            file.write(data)
        if is_new:
            self._settle(path.parent)

    def create(self, path: Path, data: bytes) -> None:
        """Begin a log under a new name, by rename and so fenced; `fsync_path` makes it survive the machine."""
        staged = self.directory / f"{next(self._numbers)}-{path.name}"
        try:
            staged.write_bytes(data)
            crash_point("create.before_rename")
            os.rename(self._inside(staged), path)
        except FileNotFoundError:
            self.check()
            raise

    def extend(self, path: Path, data: bytes) -> None:
        """Append to a log that `create` began; one that was moved or deleted is not begun again."""
        try:
            descriptor = os.open(self._through(path), os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            self.check()
            raise
        try:
            self.check()
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)

    def truncate(self, path: Path, size_bytes: int) -> None:
        """Cut a log of lines back to a length that is known to be true."""
        self.check()
        with self._through(path).open("r+b") as file:
            file.truncate(size_bytes)
            os.fsync(file.fileno())


def revoke(paths: RunPaths, by: Stage, prefix: str = "") -> None:
    """Fence every other process: rename its workshop away, then delete what it left there."""
    for name in sorted(os.listdir(paths.staging)):
        if name != by.token and name.startswith(prefix):
            by.remove(paths.staging / name)


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
