"""The ranks of this trainer: one process, those that launchers started on this machine or several, or torchrun's.

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
from torch.distributed.tensor import DTensor

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

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds a part of the model only; the mesh's last dimension is that of the parts."""
        return self.mesh.size(self.mesh.ndim - 1) > 1

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

    def norm_of_parts(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of a model's gradients, of which each rank gives that of its part: the same bits on all ranks.

        Shapes: () -> ()
        """
        if self.size == 1:
            return norm
        copies = self.size // self.mesh.size(self.mesh.ndim - 1)
        return (self.total(norm.square()) / copies).sqrt()

    def part(self) -> None:
        """Leave together: a rank that ends early takes its end of a connection away."""
        if self.size > 1:
            dist.barrier(group=self.save_group)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a parameter, its gradient or its state that this rank holds, in the same memory; under `no_grad`.

    What is done to each element alone is done to it. DTensor would give the same, once it has worked out by a trial
    how each operation goes with each sharding: up to half a second of a run's first step.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def open_world(device: torch.device, replicate: int = 1) -> World:
    """Join the other ranks, on this rank's device. A single rank needs no port: it talks to itself in memory.

    The mesh has one dimension (FSDP), or, with `replicate` copies of the model, two (HSDP).
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_store(rank, size), rank=rank, world_size=size, timeout=PATIENCE)
    mesh = _mesh(device, size, replicate)
    return World(rank, size, device, mesh, dist.new_group(backend="gloo", timeout=PATIENCE))


def _mesh(device: torch.device, size: int, replicate: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device.type, (size,))
    return init_device_mesh(
        device.type, (replicate, size // replicate), mesh_dim_names=("replicate", "shard")
    )


def _store(rank: int, size: int) -> Any:
    """Where the ranks leave word for each other: a file on one machine, `tcp://host:port/incarnation` on several.

    Keys of two incarnations never meet, even where a port is used again. None is torchrun's own store.
    """
    if size == 1:
        return dist.HashStore()  # pyright: ignore
    place = os.environ.get("RATCHET_RENDEZVOUS")
    if place is None:
        return None
    if not place.startswith("tcp://"):
        return dist.FileStore(place, size)  # pyright: ignore
    address, _, incarnation = place.removeprefix("tcp://").partition("/")
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(  # pyright: ignore
        host, int(port), size, is_master=rank == 0, timeout=PATIENCE, wait_for_workers=False
    )
    return dist.PrefixStore(incarnation, store)  # pyright: ignore


def set_determinism(threads: int) -> None:
    """Fixed thread counts and deterministic kernels: equal inputs give equal bits."""
    # cuBLAS repeats its results only with a fixed workspace, which it reads when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
