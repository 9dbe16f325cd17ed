"""Causal attention for training on a GPU: the same bits every time, and hardly slower for it.

torch's flash kernel adds up the gradient of the queries with atomics, or, where bits must repeat, one block after the
other: half as fast. cuDNN's kernels do not repeat. So, in this order:

FlashAttention 4   where the package is there and the device is one of its own (models/flash.py)
FlexAttention      whose backward pass has a loop of its own for each gradient, where it can be compiled
torch's kernel     everywhere else, and for short rows and rows with a mask

Axes: B rows, H query heads, K key-value heads, T positions, D head size.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ratchet.log import LOGGER
from ratchet.models import flash

FLASH, FLEX, PLAIN = "ratchet_fa4", "ratchet_flex", "ratchet_sdpa"
"""Names for transformers, which takes every name with `flash` in it for a kernel of its own."""
SHORTEST = 1024
"""Shorter rows have too little attention to gain from another kernel."""
ORDINARY = {"llama", "mistral", "qwen2", "qwen3"}
"""Model types whose attention is a softmax of scaled products, without caps or sinks, which only `eager` knows."""
CLOSE = 0.02
"""How far a kernel that is tried out may be from torch's: three units in the last place of bf16 near 1."""

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int | None, float], torch.Tensor]


def choose(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, *, is_recorded: bool = False
) -> None:
    """Replace `sdpa` by the fastest kernel that repeats its bits, is there, and gives what torch's gives.

    Where passes are recorded and none is, torch's own takes its place by another name: of `sdpa` transformers computes
    a dense mask while a graph is recorded, so other kernels would be recorded than were tried. It also takes the place
    of `eager` on a GPU then, for models in which both mean the same: eager's mask has its zero from the host, which a
    graph cannot read.
    """
    asked = getattr(model.config, "_attn_implementation", None)
    means_the_same = getattr(model.config, "model_type", "") in ORDINARY
    if asked == "eager" and is_recorded and device.type == "cuda" and means_the_same:
        LOGGER.info("attention: sdpa in place of eager, whose mask cannot be recorded")
    elif asked != "sdpa":
        return
    if is_recorded:
        model.set_attn_implementation(PLAIN)
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    for name, kernel in KERNELS.items():
        if name == FLASH and not _has_flash(device):
            continue
        try:
            _try_out(kernel, model, device)
        except Exception as error:  # whatever a compiler that is missing or broken raises
            LOGGER.warning(
                "attention is slower: %s does not work here (%s: %s)", name, type(error).__name__, error
            )
            continue
        model.set_attn_implementation(name)
        LOGGER.info("attention of long rows: %s", name)
        return


def _has_flash(device: torch.device) -> bool:
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return torch.cuda.get_device_capability(device)[0] in {9, 10}


def _try_out(kernel: Kernel, model: PreTrainedModel, device: torch.device) -> None:
    """Both passes over a row of the model's shape, beside torch's. Raises: whatever does not work."""
    heads, groups, size = _shape(model)
    chance = torch.Generator(device).manual_seed(0)

    def sample(count: int) -> torch.Tensor:
        shape = (1, count, SHORTEST + 8, size)  # not a whole number of blocks
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=chance).requires_grad_()

    query, key, value = sample(heads), sample(groups), sample(groups)
    scale = size**-0.5

    def both_passes(result: torch.Tensor) -> list[torch.Tensor]:
        loss = result.float().square().sum() / SHORTEST
        return [result.detach(), *torch.autograd.grad(loss, (query, key, value))]

    ours = both_passes(kernel(query, key, value, None, scale))
    theirs = both_passes(
        nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != groups
        ).transpose(1, 2)
    )
    for mine, other in zip(ours, theirs, strict=True):
        far = (mine.float() - other.float()).abs().max() / other.float().abs().max()
        if not far <= CLOSE:
            raise ValueError(f"it differs from torch's by {float(far):.3f} of the largest value")


def _shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Query heads, key-value heads and the size of a head."""
    config = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads


@functools.cache
def _compiled() -> Any:
    """Shapes are symbols from the first call on: bits must not depend on which shapes came before."""
    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=64)  # more than the lengths of recorded passes, which do not keep what they read
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
    scale: float,
) -> torch.Tensor:
    """Shapes: (B, H, T, D), (B, K, T, D) twice -> (B, T, H, D)"""
    mask = _visible(query_BHTD.shape[2], window, query_BHTD.device)
    has_groups = query_BHTD.shape[1] != key_BKTD.shape[1]
    out_BHTD = _compiled()(
        query_BHTD, key_BKTD, value_BKTD, block_mask=mask, scale=scale, enable_gqa=has_groups
    )
    return out_BHTD.transpose(1, 2).contiguous()


def _flash(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Shapes: (B, H, T, D), (B, K, T, D) twice -> (B, T, H, D)"""
    tensors = (one.transpose(1, 2) for one in (query_BHTD, key_BKTD, value_BKTD))
    return flash.attend(*tensors, window=window, scale=scale)


def _plain(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Shapes: (B, H, T, D), (B, K, T, D) twice -> (B, T, H, D)"""
    length = query_BHTD.shape[2]
    band_TT = None
    if window is not None and window < length:
        ones_TT = torch.ones(length, length, dtype=torch.bool, device=query_BHTD.device)
        band_TT = ones_TT.tril().triu(1 - window)
    out_BHTD = nn.functional.scaled_dot_product_attention(
        query_BHTD,
        key_BKTD,
        value_BKTD,
        attn_mask=band_TT,
        is_causal=band_TT is None,
        scale=scale,
        enable_gqa=query_BHTD.shape[1] != key_BKTD.shape[1],
    )
    return out_BHTD.transpose(1, 2).contiguous()


KERNELS: dict[str, Kernel] = {
    FLASH: _flash,
    FLEX: torch.compiler.disable(_flex),  # pyright: ignore[reportAssignmentType] it has no types of its own
}
"""By the name under which transformers knows them, the fastest first."""


def attend(
    kernel: Kernel,
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
    length = query.shape[2]
    has_window = (
        sliding_window is not None and length > sliding_window
    )  # which torch's kernel would not know of
    if attention_mask is not None or (length < SHORTEST and not has_window):
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
    return kernel(query, key, value, sliding_window, scale), None


for _name, _kernel in {**KERNELS, PLAIN: _plain}.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, functools.partial(attend, _kernel))
