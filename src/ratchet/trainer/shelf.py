"""Policies in shared memory, as the trainer writes them.

    publish    tensors ─► a mapped file, hashed on the way ─► the commit protocol of every directory
    prune      what no server can need goes; the pages of one file are kept for the next policy

Getting memory costs several times what filling it does. Pages are used again only once nobody else has their file
open or mapped, and a reader hashes what it has mapped (`tensor_file.read`).
"""

import shutil
import signal
import threading
from collections.abc import Collection
from pathlib import Path

import torch

from ratchet import durable, weights
from ratchet.attempts import Assignment
from ratchet.memory import MemoryStage
from ratchet.models import build, tensor_file
from ratchet.models.tensor_file import Layout, MappedFile
from ratchet.paths import RunPaths


class Shelf:
    """The policies of an attempt in memory, of which one trainer is the writer. Two threads may use it."""

    def __init__(self, assignment: Assignment, paths: RunPaths) -> None:
        """Raises: Fenced"""
        # Whoever opens a file in the instant in which it is asked for (`is_alone`) would end this process by it.
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        self.paths = paths
        self._assignment = assignment
        self._stage = MemoryStage.join(paths, assignment.stage)
        self._files: dict[int, MappedFile] = {}
        self._spare: tuple[MappedFile, Path] | None = None
        self._lock = threading.Lock()

    def publish(self, tensors: dict[str, torch.Tensor], step: int) -> bool:
        """Publish policy `step`; returns whether it takes the place of one with other content."""
        directory = self._stage.begin(f"weights_{step}")
        layout = Layout(tensors)
        file = self._open(directory / build.WEIGHTS, layout.size_bytes)
        build.save_rest(directory, tensors, self._assignment.config.model)
        others = [path.name for path in directory.iterdir() if path.name != build.WEIGHTS]
        sealed = durable.seal(directory, others)
        sealed.append(tensor_file.write(file, layout, tensors, build.WEIGHTS))
        manifest = weights.describe(directory, step=step, attempt=self._assignment.attempt, sealed=sealed)
        target = self.paths.weight(step)
        there = durable.read_committed(target)
        is_same = there is not None and weights.digest(there) == weights.digest(manifest)
        replaces = target.exists() and not is_same
        if replaces:
            self._stage.remove(target)
        self._stage.commit(directory, target, manifest)
        with self._lock:
            if is_same:
                file.close()  # the commit left the one that is there, and deleted this one
            else:
                self._forget(step)
                self._files[step] = file
        return replaces

    def _open(self, path: Path, size_bytes: int) -> MappedFile:
        """A file to fill under this name: the spare one if its size fits and nobody reads it, or else a new one."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            file, place = spare
            if file.size_bytes == size_bytes and file.is_alone():
                self._stage.hand_on(place, path)
                return file
            file.close()
            place.unlink()
        return MappedFile(path, size_bytes)

    def _forget(self, step: int) -> None:
        if (file := self._files.pop(step, None)) is not None:
            file.close()

    def prune(self, oldest_served: int, keep: Collection[int]) -> None:
        """Let go of the policies below the oldest that a server may still hold, but for some."""
        for step in durable.steps(self.paths.weights):
            if step < oldest_served and step not in keep:
                self._retire(step)

    def _retire(self, step: int) -> None:
        """Take a policy back; its file becomes the spare one if there is none."""
        place = self._stage.withdraw(self.paths.weight(step))
        if place is None:
            return
        with self._lock:
            if self._spare is None and step in self._files:
                spare = self._stage.directory / f"spare-{step}"
                self._stage.hand_on(place / build.WEIGHTS, spare)
                self._spare = self._files.pop(step), spare
            else:
                self._forget(step)
        shutil.rmtree(place)
