"""A process's way into its run: with `durable`, the only file that renames, fsyncs or deletes there.

What is published or deleted passes through a workshop of the process's own, staging/<token>. It is also the fence: a
process is revoked by renaming its workshop away, after which whatever it still tries fails with ENOENT and becomes
`Fenced`. Every way leads through a gate inside the workshop, as staging/<token>/gate/../<path>: the kernel looks it up
anew each time, and a library that makes missing directories (torch's writer of checkpoints does) would bring back the
workshop but never the gate.
"""

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import ClassVar

from ratchet import durable
from ratchet.errors import Fenced, RatchetError, Unwritable
from ratchet.paths import RunPaths
from ratchet.records import Manifest

GATE = "gate"
"""A directory that a workshop has from its opening until it is revoked; nothing is ever written into it."""


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
        durable.fsync_path(paths.staging)
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
        durable.fsync_path(self.paths.staging)
        return stage

    def revoke(self, prefix: str = "") -> None:
        """Fence every other process, or those of a prefix: rename its workshop away, then delete what it left there."""
        for name in sorted(os.listdir(self.paths.staging)):
            if name != self.token and name.startswith(prefix):
                self.remove(self.paths.staging / name)

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
        manifest = durable.signed(manifest)
        point = manifest.kind
        durable.crash_point(f"{point}.before_manifest")
        path = directory / durable.MANIFEST
        path.write_bytes(durable.encode_manifest(manifest))
        durable.fsync_path(path)
        for folder in {p.parent for p in directory.rglob("*")} | {directory}:
            durable.fsync_path(folder)
        durable.crash_point(f"{point}.before_rename")
        self._rename_new(directory, target, manifest)
        durable.crash_point(f"{point}.after_rename")
        durable.fsync_path(target.parent)
        durable.crash_point(f"{point}.committed")
        return manifest

    def _rename_new(self, directory: Path, target: Path, manifest: Manifest) -> None:
        try:
            os.rename(self._inside(directory), target)
            return
        except FileNotFoundError:
            # A network filesystem may have retried a rename that succeeded.
            there = durable.read_committed(target)
            if there is not None and there.hash == manifest.hash:
                return
            self.check()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            there = durable.read_committed(target)
            if there is None or durable.payload_digest(there.files) != durable.payload_digest(manifest.files):
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
        durable.fsync_path(staged)
        durable.crash_point(f"replace.{path.name}.before_rename")
        try:
            os.rename(self._inside(staged), path)
        except FileNotFoundError:
            self.check()
            raise
        self._settle(path.parent)

    def _settle(self, directory: Path) -> None:
        """Flush a directory and those above it, up to the run's: they may be new themselves."""
        for folder in (directory, *directory.parents):
            durable.fsync_path(folder)
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
        durable.fsync_path(path.parent)

    def remove(self, path: Path) -> None:
        """Delete a published directory or file: it stops existing at once, its bytes go afterwards."""
        grave = self.directory / f"del-{next(self._numbers)}-{path.name}"
        try:
            os.rename(path, self._inside(grave))
        except FileNotFoundError:
            self.check()
            return
        durable.crash_point("remove.after_rename")
        durable.fsync_path(path.parent)
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
            durable.crash_point("create.before_rename")
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
