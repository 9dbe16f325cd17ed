"""FlashAttention 4 as an operator that a compiled layer can contain, with a backward pass whose bits repeat.

Its backward pass adds up the gradient of the queries in a fixed order, one block after the other, and hands out the
blocks such that hardly any waits: the order costs little. The kernels are those of the package `flash-attn-4`, for
Hopper and Blackwell; torch calls them by the same two names.

Axes: B rows, T positions, H query heads, K key-value heads, D head size.
"""

import functools
import importlib
import warnings
from typing import Any

import torch

MODULE = "flash_attn.cute.interface"


@functools.cache
def _kernels() -> Any:
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")  # one a kernel
    return importlib.import_module(MODULE)


@torch.library.custom_op("ratchet::flash", mutates_args=(), device_types="cuda")
def _forward(
    query_BTHD: torch.Tensor,
    key_BTKD: torch.Tensor,
    value_BTKD: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_BTHD, logsumexp_BHT = _kernels()._flash_attn_fwd(
        query_BTHD,
        key_BTKD,
        value_BTKD,
        softmax_scale=scale,
        return_lse=True,
        **_sight(window),
    )[:2]
    return out_BTHD, logsumexp_BHT


@_forward.register_fake
def _(query_BTHD: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, length, heads, _ = query_BTHD.shape
    out_BTHD = query_BTHD.new_empty(query_BTHD.shape)
    return out_BTHD, query_BTHD.new_empty((rows, heads, length), dtype=torch.float32)


@torch.library.custom_op("ratchet::flash_backward", mutates_args=(), device_types="cuda")
def _backward(
    slope_BTHD: torch.Tensor,
    query_BTHD: torch.Tensor,
    key_BTKD: torch.Tensor,
    value_BTKD: torch.Tensor,
    out_BTHD: torch.Tensor,
    logsumexp_BHT: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query_slope, key_slope, value_slope = _kernels()._flash_attn_bwd(
        query_BTHD,
        key_BTKD,
        value_BTKD,
        out_BTHD,
        slope_BTHD,
        logsumexp_BHT,
        softmax_scale=scale,
        deterministic=True,
        **_sight(window),
    )[:3]
    return query_slope, key_slope, value_slope


@_backward.register_fake
def _(slope_BTHD: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (one.new_empty(one.shape) for one in rest[:3])
    return query, key, value


def _sight(window: int | None) -> dict[str, Any]:
    """What a query sees: what is before it and itself, and of that at most `window` positions."""
    if window is None:
        return {"causal": True}
    return {"causal": False, "window_size_left": window - 1, "window_size_right": 0}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query_BTHD, key_BTKD, value_BTKD, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(query_BTHD, key_BTKD, value_BTKD, *output)


def _differentiate(ctx: Any, slope_BTHD: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    slopes = _backward(slope_BTHD, *ctx.saved_tensors, ctx.window, ctx.scale)
    return *slopes, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def attend(
    query_BTHD: torch.Tensor,
    key_BTKD: torch.Tensor,
    value_BTKD: torch.Tensor,
    *,
    window: int | None = None,
    scale: float,
) -> torch.Tensor:
    """Causal attention, of the last `window` positions where one is given.

    Shapes: (B, T, H, D) bf16, (B, T, K, D) bf16 twice -> (B, T, H, D) bf16
    Raises: ImportError if the package is not there; what its compiler raises on a device that it does not know.
    """
    return _forward(query_BTHD.contiguous(), key_BTKD.contiguous(), value_BTKD.contiguous(), window, scale)[0]
