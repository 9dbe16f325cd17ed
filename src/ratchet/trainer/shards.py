"""What the ranks write of a checkpoint: torch's own format, by torch's own writer, into files that seal themselves."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ratchet import checkpoint, durable
from ratchet.records import FileEntry

_BUFFER_BYTES = 64 << 10
"""Gathers the small records around each tensor; larger ones pass it by."""


class _SealedShards(FileSystem):
    """The way to files of torch's writer, which keeps what a manifest will say of the shards."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.entries: list[FileEntry] = []

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        path = Path(path)
        if path.suffix != DEFAULT_SUFFIX:  # torch's index, which it renames when it is written
            with super().create_stream(path, mode) as file:
                yield file
            return
        with durable.SealedFile(path) as sealed, io.BufferedWriter(sealed, _BUFFER_BYTES) as file:
            yield file
        self.entries.append(sealed.entry(str(path.relative_to(self._directory))))


def write(directory: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> list[FileEntry]:
    """Write the tensors below a staged checkpoint, sharded ones by all ranks, and seal this rank's shard.

    Waits for: all ranks. Raises: whatever the writing of one of them raised.
    """
    # torch's own CRC32 costs half of a save and no load ever checks it; every file has our hash. The setting
    # belongs to the thread.
    torch.serialization.set_crc32_options(False)
    # One thread: torch loses the errors of more.
    writer = FileSystemWriter(_folder(directory), single_file_per_rank=True, sync_files=False, thread_count=1)
    writer.fs = shards = _SealedShards(directory)
    save(tensors, storage_writer=writer, process_group=group)
    return shards.entries


def seal_others(directory: Path) -> list[FileEntry]:
    """Seal what lies beside the shards: torch's index of them, and the trainer's small files."""
    others = (path for path in _folder(directory).iterdir() if path.suffix != DEFAULT_SUFFIX)
    return durable.seal(directory, [str(path.relative_to(directory)) for path in others])


def _folder(directory: Path) -> Path:
    return directory / checkpoint.TRAINER
