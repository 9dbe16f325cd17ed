"""CUDA graphs: the kernels of a function of fixed shapes are recorded once and then launched by one call.

A graph reads its inputs from fixed places and writes its results to fixed places; what else it reads, weights above
all, has to stay where it is, so an update copies into it. What cannot be recorded runs as on a CPU, said once.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ratchet.log import LOGGER

Recorded = tuple[torch.cuda.CUDAGraph, Any]


class Graphs:
    """Recorded functions by name; the memory between their inputs and results is one for all. Verbs: record, run"""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, Recorded] = {}
        self._inputs: dict[Hashable, Sequence[torch.Tensor]] = {}
        self._pool: Any = None
        self._is_broken = False

    def run(
        self,
        name: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> Any:
        """`function(*inputs)`; on a GPU its results are overwritten by the next call, whatever its name."""
        if not self.record(name, function, inputs, device):
            return function(*(tensor.to(device) for tensor in inputs))
        for place, tensor in zip(self._inputs[name], inputs, strict=True):
            place.copy_(tensor)
        graph, results = self._recorded[name]
        graph.replay()
        return results

    def record(
        self,
        name: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> bool:
        """See to it that a function is recorded, which runs it once: libraries set themselves up then.

        Returns: whether it is; on a CPU never.
        """
        if name in self._recorded:
            return True
        if device.type != "cuda" or self._is_broken:
            return False
        places = [tensor.to(device).clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*places)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = function(*places)
        except RuntimeError as error:
            LOGGER.warning("The model cannot be recorded as a CUDA graph (%s): it runs slower.", error)
            self._is_broken = True
            return False
        self._pool = graph.pool()
        self._inputs[name], self._recorded[name] = places, (graph, results)
        return True
