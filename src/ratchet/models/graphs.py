"""CUDA graphs: the kernels of a function of fixed shapes are recorded once and then launched by one call.

A graph reads its inputs from fixed places and writes its results to fixed places; what else it reads, weights above
all, has to stay where it is, so an update copies into it.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ratchet.errors import Refusal
from ratchet.log import LOGGER

MOST = 64
"""Graphs of one set. Each holds some megabytes of the device for its thousands of kernels."""


class Graphs:
    """Recorded functions by name; the memory between their inputs and results is one for all. Verbs: record, run

    What cannot be recorded runs as on a CPU, said once; or is refused with the remedy, where one is given.
    """

    def __init__(self, remedy: str | None = None) -> None:
        self._remedy = remedy
        self._recorded: dict[Hashable, tuple[Callable[[], None], Any]] = {}
        """What launches each, and where its results are then."""
        self._inputs: dict[Hashable, Sequence[torch.Tensor]] = {}
        self._pool: Any = None
        self._records = True

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
        launch, results = self._recorded[name]
        launch()
        return results

    def record(
        self,
        name: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> bool:
        """See to it that a function is recorded. It is run once before: libraries set themselves up then.

        The device's random numbers go on as if nothing had been run.
        Returns: whether it is recorded; on a CPU nothing is. Raises: Refusal
        """
        if name in self._recorded:
            return True
        if not (self._records and self._can_record(device)):
            return False
        places = [tensor.to(device).clone() for tensor in inputs]
        try:
            with _undisturbed(device):
                function(*places)
                recorded = self._capture(function, places)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = f"The model cannot be recorded as a CUDA graph ({str(error).partition(chr(10))[0]})"
            if self._remedy is not None:
                raise Refusal(f"{said}: {self._remedy}.") from error
            LOGGER.warning("%s: it runs slower.", said)
            self._records = False
            return False
        self._inputs[name], self._recorded[name] = places, recorded
        LOGGER.debug("recorded as a CUDA graph: %s", name)
        if len(self._recorded) == MOST:
            LOGGER.warning("%d shapes are recorded as CUDA graphs: the others run slower.", MOST)
            self._records = False
        return True

    def _can_record(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def _capture(
        self, function: Callable[..., Any], places: Sequence[torch.Tensor]
    ) -> tuple[Callable[[], None], Any]:
        """What launches the function again, and where its results are then. Raises: RuntimeError"""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = function(*places)
        self._pool = graph.pool()
        return graph.replay, results


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """On a stream of its own, which is left however this ends; random numbers go on as if nothing had been drawn."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    current, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    own.wait_stream(current)
    with torch.random.fork_rng(devices=[device]):
        torch.cuda.set_stream(own)
        try:
            yield
        finally:
            torch.cuda.set_stream(current)
            current.wait_stream(own)
