"""A copy of the training state in host memory: what an asynchronous save writes while training goes on.

torch's own stager fails on sharded tensors before 2.13, and one save in flight needs no more than this.
"""

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Parts = dict[str, dict[str, torch.Tensor]]


class Staging:
    """Buffers that are allocated once, pinned where there is a GPU, and filled again by each save."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> Parts:
        """The state as it is now, on the host; valid until the next call.

        Waits for: the copy. After it returns the optimizer may touch the live tensors.
        """
        staged = {
            part: {name: self._copy(f"{part}.{name}", tensor) for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return staged

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return self._fill(name, tensor)
        return DTensor.from_local(
            self._fill(name, tensor.to_local()),
            self._on_host(tensor.device_mesh),
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _fill(self, name: str, source: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            pinned = self._device.type == "cuda"
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        return buffer.copy_(source.detach(), non_blocking=True)

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same ranks as a mesh of host memory. All ranks ask for it at the same time."""
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]
