"""One kernel in place of several for a chain of operations on a GPU, where a compiler is there."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ratchet.log import LOGGER


def fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled for any shape on a GPU; the function itself on a CPU or without a compiler."""
    if device.type != "cuda" or not _can_compile(device):
        return function
    return _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shapes are symbols from the first call on: bits must not depend on which shapes came before."""
    return torch.compile(function, dynamic=True)


@functools.cache
def _can_compile(device: torch.device) -> bool:
    try:
        _compiled(_probe)(torch.ones(3, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken raises
        LOGGER.warning("nothing can be compiled for the GPU here (%s): training is slower", error)
        return False
    return True


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.exp().sum()
