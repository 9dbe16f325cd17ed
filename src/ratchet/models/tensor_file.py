"""safetensors files in mapped memory: written at the speed of a copy, read without one.

    8 bytes      length of the header, little-endian
    the header   JSON: name -> dtype, shape, place; padded with spaces to a multiple of 8 bytes
    the tensors  one after the other, the largest alignment first, then by name

The bytes are those of `safetensors.torch.save_file`, so that a policy has one digest, whichever way it went.
"""

import fcntl
import json
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash

from ratchet.errors import Damaged
from ratchet.records import FileEntry

THREADS = max(1, min(8, len(os.sched_getaffinity(0))))
"""How many copy at a time. One thread more hashes what they have written, in the order of the file."""
_PIECE_BYTES = 32 << 20

# The order in which safetensors lays types out, by falling alignment; within one type tensors go by name.
_TYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_TYPES.values())}


class Layout:
    """Where each tensor goes: a function of names, types and shapes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.names = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.names:
            tensor = tensors[name]
            start, end = end, end + tensor.nbytes
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.offsets = {name: len(self.header) + entries[name]["data_offsets"][0] for name in self.names}
        self.size_bytes = len(self.header) + end


class MappedFile:
    """A file of a tmpfs, mapped into this process for as long as its pages are of use.

    Its memory is allocated at once: a full tmpfs is an error here, not the death of whoever touches a page.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Raises: OSError"""
        self.size_bytes = size_bytes
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.posix_fallocate(self._descriptor, 0, size_bytes)
            self.bytes = mmap.mmap(self._descriptor, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self._descriptor)
            raise OSError(error.errno, error.strerror, str(path)) from None

    def is_alone(self) -> bool:
        """Whether nobody else has this file open or mapped; False where the kernel does not say."""
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of the mapping; the pages stay as long as a name or a reader does."""
        self.bytes.close()
        os.close(self._descriptor)


def write(file: MappedFile, layout: Layout, tensors: Mapping[str, torch.Tensor], name: str) -> FileEntry:
    """Fill a file of the layout's size and hash it on the way; returns what a manifest says of it."""
    hasher = xxhash.xxh3_128()
    file.bytes[: len(layout.header)] = layout.header
    hasher.update(layout.header)
    with ThreadPoolExecutor(THREADS) as pool, memoryview(file.bytes) as view:
        pieces = [
            (piece, pool.submit(_copy, view, *piece, source))
            for tensor in layout.names
            for piece, source in _pieces(layout.offsets[tensor], tensors[tensor])
        ]
        for (start, size_bytes), copied in pieces:
            copied.result()
            hasher.update(view[start : start + size_bytes])
        del pieces
    return FileEntry(name=name, size=layout.size_bytes, xxh3=hasher.hexdigest())


def _pieces(offset: int, tensor: torch.Tensor) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """A tensor as runs of bytes, each with its place in the file."""
    if tensor.nbytes == 0:
        return []
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return [
        ((offset + start, part.numel()), part)
        for start, part in zip(range(0, data.numel(), _PIECE_BYTES), data.split(_PIECE_BYTES), strict=True)
    ]


def _copy(view: memoryview, start: int, size_bytes: int, source: torch.Tensor) -> None:
    torch.frombuffer(view, dtype=torch.uint8, count=size_bytes, offset=start).copy_(source)


def read(directory: Path, entry: FileEntry) -> dict[str, torch.Tensor]:
    """The tensors of a published file, on the CPU, as views of its pages; those are hashed, whatever the name is of.

    Raises: Damaged if they are not what the manifest says
    """
    path = directory / entry.name
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_COPY
            )  # torch wants memory that can be written
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read ({error}); its manifest lists it.") from None
    found = xxhash.xxh3_128_hexdigest(pages)
    if found != entry.xxh3:
        raise Damaged(f"{path} is damaged: expected xxh3 {entry.xxh3}, found {found}.")
    try:
        (length,) = struct.unpack_from("<Q", pages)
        header = json.loads(pages[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _view(pages, 8 + length, **facts) for name, facts in header.items()}
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise Damaged(f"The tensors of {path} cannot be read: {error!r}.") from None


def _view(
    pages: mmap.mmap, begin: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> torch.Tensor:
    start, end = data_offsets
    kind = _TYPES[dtype]
    if start == end:
        return torch.empty(shape, dtype=kind)
    count = (end - start) // kind.itemsize
    return torch.frombuffer(pages, dtype=kind, count=count, offset=begin + start).reshape(shape)
