"""CUDA graphs of the slot model: a step's kernels are recorded once and then launched by one call.

Decode always has the same shape, so it needs one graph for each cache span; prompts are padded at the right to a few
lengths. A graph reads its inputs from fixed places and writes its results to fixed places; the weights too stay where
they are, because an update copies into them. Whatever cannot be recorded runs as on a CPU, said once.

Axes: S slots, L tokens of a padded prompt.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ratchet.log import LOGGER

Recorded = tuple[torch.cuda.CUDAGraph, Any]
PROMPT_LENGTHS = (64, 128, 256, 512, 1024)


class Graphs:
    """Recorded functions of fixed shape, by name."""

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
        if device.type != "cuda" or self._is_broken:
            return function(*(tensor.to(device) for tensor in inputs))
        if name not in self._recorded and not self._record(name, function, inputs, device):
            return function(*(tensor.to(device) for tensor in inputs))
        for place, tensor in zip(self._inputs[name], inputs, strict=True):
            place.copy_(tensor)
        graph, results = self._recorded[name]
        graph.replay()
        return results

    def _record(
        self,
        name: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> bool:
        """Record a function after a first run, in which libraries set themselves up. False if it cannot be."""
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


def padded_length(length: int, longest: int) -> int | None:
    """The length that a prompt is padded to; None if it runs at its own."""
    return next((padded for padded in PROMPT_LENGTHS if length <= padded <= longest), None)
