"""What stands in a mirror. An entry is a directory of objects that counts once its manifest is there.

    <url>/step_40.l2.6d1f0a93b5c7/{checkpoints/step_40/..., weights/..., metrics/..., MANIFEST.json}

An object store has no rename, so nothing is written under a name that could mean something else: the name holds the
step, the lineage and a digest of the content. Two writers, one of them replaced long ago, can meet only in equal
bytes. The manifest is written last; a reader believes it only if it hashes to what it says, and each file only if it
hashes to what the manifest says.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ratchet import durable
from ratchet.durable import MANIFEST
from ratchet.errors import Damaged, Refusal
from ratchet.records import FileEntry, Manifest

KIND = "mirror"
_NAME = re.compile(r"step_(\d+)\.l(\d+)\.[0-9a-f]{12}")
_CHUNK_BYTES = 8 << 20


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where an entry comes from; the `meta` of its manifest."""

    run_id: str
    lineage: int
    kind: str
    record: int
    """The attempt that was the newest: its record and configuration are in the entry."""
    checkpoint: str
    """The hash of the checkpoint's own manifest."""


@dataclass(frozen=True)
class Entry:
    """One whole entry: its name below the mirror's address, and its manifest."""

    name: str
    manifest: Manifest
    origin: Origin

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def order(self) -> tuple[int, int]:
        """A run that was rolled back goes on in a new lineage: its lower steps are newer."""
        return self.origin.lineage, self.manifest.step

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.manifest.files)


def entry_name(step: int, lineage: int, files: Iterable[FileEntry]) -> str:
    return f"step_{step}.l{lineage}.{durable.payload_digest(files)[:12]}"


def parse(name: str) -> tuple[int, int]:
    """Lineage and step of an entry's name: the order in which entries are newer."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[2]), int(match[1])


def line(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that lead to the newest one, in order: without those that a rollback left behind."""
    found: list[Entry] = []
    for entry in sorted(entries, key=lambda e: e.order, reverse=True):
        if not found or entry.step < found[-1].step:
            found.append(entry)
    return found[::-1]


class Store:
    """A mirror's address, opened. Every error of the store itself is an OSError or of its client's kind."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = _open(self.url)

    def names(self) -> list[str]:
        """The names that entries have here, whole or not."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in found if _NAME.fullmatch(name := path.rstrip("/").rpartition("/")[2]))

    def read(self, name: str) -> Entry | None:
        """One entry; None where there is no manifest: an upload that did not end. Raises: Damaged."""
        try:
            data = self._fs.cat_file(self._path(name, MANIFEST))
        except FileNotFoundError:
            return None
        try:
            manifest = durable.decode_manifest(data, f"{self.url}/{name}/{MANIFEST}")
            origin = msgspec.convert(manifest.meta, Origin)
        except msgspec.ValidationError as error:
            raise Damaged(
                f"{self.url}/{name}/{MANIFEST} is not that of a mirrored checkpoint ({error})."
            ) from None
        for file in manifest.files:
            if file.name.startswith("/") or ".." in file.name.split("/"):
                raise Damaged(f"{self.url}/{name} names a file outside itself ({file.name}): it is not ours.")
        if name != entry_name(manifest.step, origin.lineage, manifest.files):
            raise Damaged(f"{self.url}/{name} is damaged: its manifest belongs to another name.")
        return Entry(name, manifest, origin)

    def entries(self) -> tuple[list[Entry], list[str]]:
        """The whole entries, and a sentence for each manifest that is damaged."""
        found, problems = [], []
        for name in self.names():
            try:
                if (entry := self.read(name)) is not None:
                    found.append(entry)
            except Damaged as error:
                problems.append(str(error))
        return found, problems

    def torn(self) -> list[str]:
        """The names under which no manifest stands."""
        return [name for name in self.names() if not self._fs.exists(self._path(name, MANIFEST))]

    def put(self, source: Path, name: str, file: FileEntry) -> None:
        """Write one file and read it back. Raises: Damaged if what stands there is not `file`."""
        path = self._path(name, file.name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(source), path)
        hasher = xxhash.xxh3_128()
        with self._fs.open(path, "rb", cache_type="readahead", block_size=_CHUNK_BYTES) as there:
            while chunk := there.read(_CHUNK_BYTES):
                hasher.update(chunk)
        if hasher.hexdigest() != file.xxh3:
            raise Damaged(
                f"{self.url}/{name}/{file.name} was written as xxh3 {hasher.hexdigest()}, not {file.xxh3}."
            )

    def commit(self, name: str, manifest: Manifest) -> None:
        """Write the manifest: from now on the entry counts."""
        self._fs.pipe_file(self._path(name, MANIFEST), durable.encode_manifest(manifest))

    def get_bytes(self, entry: Entry, file_name: str) -> bytes:
        """One small file, verified. Raises: Damaged."""
        (file,) = [f for f in entry.manifest.files if f.name == file_name]
        try:
            data = self._fs.cat_file(self._path(entry.name, file_name))
        except FileNotFoundError:
            raise self._missing(entry, file) from None
        self._check(entry, file, durable.hash_bytes(data))
        return data

    def get(self, entry: Entry, file: FileEntry, target: Path) -> None:
        """Fetch one file, verified as it lies on our disk. Raises: Damaged."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fs.get_file(self._path(entry.name, file.name), str(target))
        except FileNotFoundError:
            raise self._missing(entry, file) from None
        durable.fsync_path(target)
        self._check(entry, file, durable.hash_file(target))

    def remove(self, name: str) -> None:
        """Delete an entry, its manifest first: it stops to count at once."""
        path = self._path(name, MANIFEST)
        if self._fs.exists(path):
            self._fs.rm_file(path)
        if self._fs.exists(self._path(name)):
            self._fs.rm(self._path(name), recursive=True)

    def _path(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *parts))

    def _missing(self, entry: Entry, file: FileEntry) -> Damaged:
        return Damaged(f"{self.url}/{entry.name}/{file.name} is missing; its manifest lists it.")

    def _check(self, entry: Entry, file: FileEntry, found: str) -> None:
        if found != file.xxh3:
            raise Damaged(
                f"{self.url}/{entry.name}/{file.name} is damaged: expected xxh3 {file.xxh3}, found {found}."
            )


def _open(url: str) -> tuple[Any, str]:
    """Raises: Refusal for an address that no installed package can open."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = (
            "`uv sync --extra s3` installs it"
            if url.startswith("s3:")
            else "install the package that it names"
        )
        raise Refusal(f"ckpt.mirror {url!r} needs a package that is not here ({error}): {extra}.") from None
    except ValueError as error:
        raise Refusal(
            f"ckpt.mirror {url!r} is not an address ({error}): give s3://bucket/prefix or file:///directory."
        ) from None
