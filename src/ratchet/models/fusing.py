"""One kernel in place of several for a chain of operations on a GPU, where a compiler is there."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ratchet.log import LOGGER


def fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled on a GPU for any first dimension; the function itself on a CPU or without a compiler."""
    if device.type != "cuda" or not _can_compile(device):
        return function
    return functools.partial(_call, function)


def _call(function: Callable[..., Any], *given: Any) -> Any:
    """The first dimension is a symbol from the first call on: bits must not depend on which sizes came before. The
    others are numbers, from which the compiler sees how to read several values at once."""
    for one in given:
        if isinstance(one, torch.Tensor) and one.ndim:
            torch._dynamo.maybe_mark_dynamic(one, 0)
    return _compiled(function)(*given)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@functools.cache
def _can_compile(device: torch.device) -> bool:
    try:
        _call(_probe, torch.ones(3, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken raises
        LOGGER.warning("nothing can be compiled for the GPU here (%s): training is slower", error)
        return False
    return True


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.exp().sum()
