"""The ranks of this trainer: one process, those that the launcher started on this machine, or torchrun's.

Who waits for whom: in every collective each rank waits for all others, however long. That one of them has died or
frozen is for the launcher to notice, which looks at each.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = timedelta(days=30)
"""Rank 0 may wait for a batch as long as it takes to sample one; the others wait for rank 0."""


@dataclass(frozen=True)
class World:
    """Who this rank is, and how it talks to the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    save_group: Any
    """A group of its own for background saves: two threads must not share one."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place. Shapes: (N,) -> (N,)"""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def part(self) -> None:
        """Leave together: a rank that ends early takes its end of a connection away."""
        if self.size > 1:
            dist.barrier(group=self.save_group)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` takes a GPU where there is one."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def open_world(wanted_device: str) -> World:
    """Join the other ranks. A single rank needs no port: it talks to itself in memory."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(wanted_device, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_store(size), rank=rank, world_size=size, timeout=PATIENCE)
    mesh = init_device_mesh(device.type, (size,))
    return World(rank, size, device, mesh, dist.new_group(backend="gloo", timeout=PATIENCE))


def _store(size: int) -> Any:
    """Where the ranks leave word for each other; None is torchrun's own."""
    if size == 1:
        return dist.HashStore()  # pyright: ignore
    path = os.environ.get("RATCHET_RENDEZVOUS")
    return dist.FileStore(path, size) if path is not None else None  # pyright: ignore


def set_determinism(threads: int) -> None:
    """Fixed thread counts and deterministic kernels: equal inputs give equal bits."""
    # cuBLAS repeats its results only with a fixed workspace, which it reads when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
