"""What the ranks write of a checkpoint: torch's own format, by torch's own writer, into files that seal themselves.

Each rank writes `FILES` of them, all at once while the training waits for them, one after the other beside it. How
they are cut does not depend on that.
"""

import io
import threading
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ratchet import checkpoint, durable
from ratchet.records import FileEntry

FILES = 2
_BUFFER_BYTES = 64 << 10
"""Gathers the small records around each tensor; larger ones pass it by."""


class _SealedShards(FileSystem):
    """The way to files of torch's writer, which keeps what a manifest will say of the shards."""

    def __init__(self, directory: Path, at_once: int) -> None:
        self._directory = directory
        self._turn = threading.Semaphore(at_once)
        self.entries: list[FileEntry] = []
        self.error: BaseException | None = None

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        path = Path(path)
        if path.suffix != DEFAULT_SUFFIX:  # torch's index, which it renames when it is written
            with super().create_stream(path, mode) as file:
                yield file
            return
        # The setting belongs to the thread. torch's own CRC32 costs half of a save and no load ever checks it; every
        # file has our hash.
        torch.serialization.set_crc32_options(False)
        with self._turn:
            try:
                sealed = durable.SealedFile(path)
            except BaseException as error:
                self.error = error
                raise
            try:
                with sealed, io.BufferedWriter(sealed, _BUFFER_BYTES) as file:
                    yield file
            except BaseException as error:
                self.error = error  # for `_Writer`, which raises it where torch tells all ranks
                return
        self.entries.append(sealed.entry(str(path.relative_to(self._directory))))


class _Writer(FileSystemWriter):
    """torch's writer, which loses the errors of all threads but the first."""

    fs: _SealedShards

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Raises: what a thread failed of, so that torch tells all ranks; OSError if one ended without a word."""
        written = super().write_data(plan, planner)
        if self.fs.error is not None:
            raise self.fs.error
        done = {result.index for result in written.value()}
        if lacking := [item.index for item in plan.items if item.index not in done]:
            raise OSError(
                f"{len(lacking)} of {len(plan.items)} tensors were not written, {lacking[0].fqn} first"
            )
        return written


def write(
    directory: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None, *, at_once: int
) -> list[FileEntry]:
    """Write the tensors below a staged checkpoint, sharded ones by all ranks, and seal this rank's shards.

    `at_once` of a rank's files are written at one time.
    Waits for: all ranks. Raises: whatever the writing of one of them raised.
    """
    writer = _Writer(_folder(directory), single_file_per_rank=True, sync_files=False, thread_count=FILES)
    writer.fs = shards = _SealedShards(directory, at_once)
    save(tensors, storage_writer=writer, process_group=group)
    return sorted(shards.entries)


def seal_others(directory: Path) -> list[FileEntry]:
    """Seal what lies beside the shards: torch's index of them, and the trainer's small files."""
    others = (path for path in _folder(directory).iterdir() if path.suffix != DEFAULT_SUFFIX)
    return durable.seal(directory, [str(path.relative_to(directory)) for path in others])


def _folder(directory: Path) -> Path:
    return directory / checkpoint.TRAINER
