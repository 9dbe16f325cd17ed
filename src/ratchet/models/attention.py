"""Causal attention for training on a GPU: the same bits every time, and no slower for it.

torch's flash kernel adds up the gradient of the queries with atomics, or, where bits must repeat, one block after the
other: half as fast. FlexAttention's backward pass has a loop of its own for each gradient and needs neither. cuDNN's
kernels are the fastest, and do not repeat.

Axes: B rows, H query heads, K key-value heads, T positions, D head size.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ratchet.log import LOGGER

NAME = "ratchet_flex"
SHORTEST = 1024
"""Shorter rows have too little attention to gain from another kernel."""


def choose(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Replace `sdpa` where FlexAttention is faster and can be compiled."""
    is_sdpa = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if not (is_sdpa and device.type == "cuda" and dtype == torch.bfloat16):
        return
    try:
        _try_out(device)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        LOGGER.warning(
            "FlexAttention cannot be compiled here (%s): attention is slower.", type(error).__name__
        )
        return
    model.set_attn_implementation(NAME)


def _try_out(device: torch.device) -> None:
    sample = torch.zeros((1, 2, SHORTEST, 64), device=device, dtype=torch.bfloat16, requires_grad=True)
    _flex(sample, sample, sample, None, 1.0).sum().backward()


@functools.cache
def _compiled() -> Any:
    """Shapes are symbols from the first call on: bits must not depend on which shapes came before."""
    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=16)
def _visible(length: int, window: int | None, device: torch.device) -> BlockMask:
    def is_visible(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        behind = query - key
        return behind >= 0 if window is None else (behind >= 0) & (behind < window)

    return create_block_mask(is_visible, None, None, length, length, device=str(device))


def _flex(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    mask = _visible(query_BHTD.shape[2], window, query_BHTD.device)
    has_groups = query_BHTD.shape[1] != key_BKTD.shape[1]
    return _compiled()(
        query_BHTD, key_BKTD, value_BKTD, block_mask=mask, scale=scaling, enable_gqa=has_groups
    )


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls. Rows are padded at the right: only shared ones have a mask."""
    if attention_mask is not None or query.shape[2] < SHORTEST:
        is_causal = attention_mask is None
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            is_causal=is_causal,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _flex(query, key, value, sliding_window, scale).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
