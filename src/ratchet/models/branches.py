"""Rows in which several sequences share their beginning: what a model must be told, and which models understand it.

Axes: B rows, T columns.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from ratchet.models import attention

KNOWN = {"gemma", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
"""Model types that were tried out. Others may look at columns or the order of inputs in ways that no setting tells."""
BranchTensors = tuple[torch.Tensor, torch.Tensor]
"""positions_BT and owners_BT: see `trainer.packing.Branches`."""


def are_known(model: PreTrainedModel) -> bool:
    """Whether this model looks at tokens by the mask and the positions it is given, and by nothing else."""
    config = model.config
    return (
        config.model_type in KNOWN
        and not getattr(config, "sliding_window", None)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config._attn_implementation in {"eager", "sdpa", *attention.KERNELS}
    )


def inputs(model: PreTrainedModel, positions_BT: torch.Tensor, owners_BT: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass."""
    mask_B1TT = visibility(owners_BT)[:, None]
    if model.config._attn_implementation == "eager":  # which adds the mask to the scores
        dtype = next(model.parameters()).dtype
        mask_B1TT = torch.where(mask_B1TT, 0.0, torch.finfo(dtype).min).to(dtype)
    return {"attention_mask": mask_B1TT, "position_ids": positions_BT}


def visibility(owners_BT: torch.Tensor) -> torch.Tensor:
    """Which cell (last axis) each cell sees: the trunk's and its owner's before it. Shapes: -> (B, T, T) bool"""
    columns_T = torch.arange(owners_BT.shape[1], device=owners_BT.device)
    seen_B1T, seeing_BT1 = owners_BT[:, None, :], owners_BT[:, :, None]
    return (columns_T <= columns_T[:, None]) & ((seen_B1T == 0) | (seen_B1T == seeing_BT1))
