"""Checkpoints as torch itself reads them."""

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def plain_dcp(directory):
    """Every tensor of a checkpoint, by plain DCP, without our code."""
    reader = FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    tensors = {name: torch.zeros(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
