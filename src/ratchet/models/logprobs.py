"""The policy as training sees it: token log-probabilities instead of logits.

Axes: B rows, T positions, M = B * T cells, N = tokens that are asked for, V vocabulary, D hidden.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ratchet.errors import Refusal
from ratchet.models import branches
from ratchet.models.branches import BranchTensors

# Settings by which some models transform the head's output; `Policy` applies the head alone.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
CHUNK_LOGITS = 2**28
"""Logits that exist at one time: half a gigabyte in bf16, and twice that in fp32 beside it."""


class Policy(nn.Module):
    """A causal language model whose forward pass yields the log-probability of given next tokens.

    Only positions that count are projected to the vocabulary, and never more than `CHUNK_LOGITS` logits at once,
    so that those of a long batch do not have to fit in memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        unusual = [name for name in _LOGIT_SETTINGS if getattr(model.config, name, None)]
        if unusual:
            raise Refusal(f"Models that transform their logits ({', '.join(unusual)}) are not supported.")
        self.model = model

    def forward(
        self,
        inputs_BT: torch.Tensor,
        cells_N: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        shared: BranchTensors | None = None,
    ) -> torch.Tensor:
        """Log-probability of each target, given what its cell (row * T + column) and those that it sees hold.

        Rows are padded at the right; causal attention makes the padding invisible to the tokens before it. Where
        rows hold several sequences that share a beginning, `shared` says which cell belongs to which.
        Shapes: (B, T) int64, (N,) int64, (N,) int64 -> (N,) float32
        """
        seen = {} if shared is None else branches.inputs(self.model, *shared)
        hidden_BTD = self.model.base_model(input_ids=inputs_BT, use_cache=False, **seen).last_hidden_state
        return head_logprobs(
            self.model.get_output_embeddings(), hidden_BTD.flatten(0, 1), cells_N, targets_N, temperature
        )


def head_logprobs(
    head: Any, hidden_MD: torch.Tensor, cells_N: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Project the wanted cells to the vocabulary and take the targets' log-probabilities.

    Shapes: (M, D), (N,) int64, (N,) int64 -> (N,) float32
    """
    chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])
    if len(cells_N) <= chunk // 4 or type(head) is not nn.Linear or head.bias is not None:
        logits_NV = head(hidden_MD.index_select(0, cells_N)).float() / temperature
        return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return HeadLogprobs.apply(hidden_MD, head.weight, cells_N, targets_N, temperature, chunk)  # pyright: ignore


class HeadLogprobs(torch.autograd.Function):
    """Head and log-softmax in one, chunk by chunk: the backward pass computes the logits again.

    Of the size of the vocabulary it keeps nothing between the passes, and adds up the head's gradient in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        cells_N: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_MD, weight_VD, cells_N, targets_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        parts = []
        for cells, targets in zip(cells_N.split(chunk), targets_N.split(chunk), strict=True):
            logits_CV = hidden_MD[cells] @ weight_VD.t()
            if temperature != 1.0:
                logits_CV = logits_CV.float().div_(temperature)
            logprobs_CV = logits_CV.log_softmax(-1, dtype=torch.float32)
            parts.append(logprobs_CV.gather(-1, targets[:, None]).squeeze(-1))
            del logits_CV, logprobs_CV
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_MD, weight_VD, cells_N, targets_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        slopes_N = slopes[0].float() / ctx.temperature
        for cells, targets, slopes_C in zip(
            *(one.split(ctx.chunk) for one in (cells_N, targets_N, slopes_N)), strict=True
        ):
            hidden_CD = hidden_MD[cells]
            logits_CV = hidden_CD @ weight_VD.t()
            if ctx.temperature != 1.0:
                logits_CV = logits_CV.float().div_(ctx.temperature)
            slope_CV = logits_CV.softmax(-1, dtype=torch.float32)
            # d logprob / d logits = (one at the target) - softmax
            at_target_C1 = (1 - slope_CV.gather(-1, targets[:, None])) * slopes_C[:, None]
            slope_CV.mul_(-slopes_C[:, None]).scatter_(-1, targets[:, None], at_target_C1)
            slope_CV = slope_CV.to(weight_VD.dtype)
            del logits_CV
            if hidden_grad_MD is not None:
                hidden_grad_MD.index_add_(0, cells, slope_CV @ weight_VD)  # a cell may have several targets
            if weight_grad_VD is not None:
                weight_grad_VD += slope_CV.t() @ hidden_CD
        whole = None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype)
        return hidden_grad_MD, whole, None, None, None, None
