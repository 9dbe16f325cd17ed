"""The policy as training sees it: token log-probabilities instead of logits.

Axes: B rows, T positions, M = B * T cells, N = tokens that are asked for, V vocabulary, D hidden.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ratchet.models import branches
from ratchet.models.branches import BranchTensors
from ratchet.models.fusing import fused

CHUNK_LOGITS = 2**28
"""Logits that exist at one time: half a gigabyte in bf16, and their gradient beside them."""


class Policy(nn.Module):
    """A causal language model whose forward pass yields the log-probability of given next tokens.

    Only positions that count are projected to the vocabulary, `CHUNK_LOGITS` logits at once at most. Where
    `keeps_logits` is false, the logits of a long batch do not have to fit in memory: they are computed twice.
    """

    def __init__(self, model: PreTrainedModel, *, keeps_logits: bool = False) -> None:
        super().__init__()
        self.keeps_logits = keeps_logits
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
        hidden_BTD = body(self.model)(input_ids=inputs_BT, use_cache=False, **seen).last_hidden_state
        return head_logprobs(
            self.model.get_output_embeddings(),
            hidden_BTD.flatten(0, 1),
            cells_N,
            targets_N,
            temperature,
            keeps_logits=self.keeps_logits,
        )


def body(model: PreTrainedModel) -> Any:
    """The model without its head. The text part of a larger model may name a body that only the whole has."""
    return model.model if model.base_model is model else model.base_model


def head_logprobs(
    head: Any,
    hidden_MD: torch.Tensor,
    cells_N: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    *,
    keeps_logits: bool = False,
) -> torch.Tensor:
    """Project the wanted cells to the vocabulary and take the targets' log-probabilities.

    Shapes: (M, D), (N,) int64, (N,) int64 -> (N,) float32
    """
    chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])
    if len(cells_N) <= chunk // 4 or type(head) is not nn.Linear or head.bias is not None:
        logits_NV = head(hidden_MD.index_select(0, cells_N)).float() / temperature
        return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return HeadLogprobs.apply(  # pyright: ignore
            hidden_MD, head.weight, cells_N, targets_N, temperature, chunk, keeps_logits
        )


class HeadLogprobs(torch.autograd.Function):
    """Head and log-softmax in one, chunk by chunk: the backward pass takes the logits, or computes them again.

    Of the size of the vocabulary it keeps nothing else between the passes, and adds up the head's gradient in fp32.
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
        keeps_logits: bool,
    ) -> torch.Tensor:
        ctx.temperature, ctx.chunk = temperature, chunk
        normalize = fused(_normalize, hidden_MD.device)
        logprobs, normalizers, kept = [], [], []
        for cells, targets in zip(cells_N.split(chunk), targets_N.split(chunk), strict=True):
            logits_CV = hidden_MD[cells] @ weight_VD.t()
            logprobs_C, normalizers_C = normalize(logits_CV, targets, temperature)
            logprobs.append(logprobs_C)
            normalizers.append(normalizers_C)
            if keeps_logits and any(ctx.needs_input_grad):
                kept.append(logits_CV)
        ctx.save_for_backward(hidden_MD, weight_VD, cells_N, targets_N, torch.cat(normalizers), *kept)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_MD, weight_VD, cells_N, targets_N, normalizers_N, *kept = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        differentiate = fused(_differentiate, hidden_MD.device)
        parts = (one.split(ctx.chunk) for one in (cells_N, targets_N, normalizers_N, slopes[0].float()))
        for i, (cells, targets, normalizers_C, slopes_C) in enumerate(zip(*parts, strict=True)):
            hidden_CD = hidden_MD[cells]
            logits_CV = kept[i] if kept else hidden_CD @ weight_VD.t()
            slope_CV = differentiate(logits_CV, targets, normalizers_C, slopes_C, ctx.temperature)
            if hidden_grad_MD is not None:
                hidden_grad_MD.index_add_(0, cells, slope_CV @ weight_VD)  # a cell may have several targets
            if weight_grad_VD is not None:
                _add_product(weight_grad_VD, slope_CV.t(), hidden_CD)
        whole = None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype)
        return hidden_grad_MD, whole, *(None,) * 5


def _normalize(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' log-probabilities, and what all logits of a row are lowered by to become log-probabilities.

    Shapes: (C, V), (C,) int64 -> (C,) float32 twice
    """
    scaled_CV = logits_CV.float() / temperature
    normalizers_C = scaled_CV.logsumexp(-1)
    return scaled_CV.gather(-1, targets_C[:, None]).squeeze(-1) - normalizers_C, normalizers_C


def _differentiate(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    normalizers_C: torch.Tensor,
    slopes_C: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The gradient of the logits from that of the log-probabilities: (one at the target) - softmax, times the slope.

    Shapes: (C, V), (C,) int64, (C,) float32 twice -> (C, V) of the logits' dtype
    """
    softmax_CV = (logits_CV.float() / temperature - normalizers_C[:, None]).exp()
    words_V = torch.arange(logits_CV.shape[-1], device=logits_CV.device)
    is_target_CV = words_V == targets_C[:, None]
    return ((is_target_CV.float() - softmax_CV) * (slopes_C / temperature)[:, None]).to(logits_CV.dtype)


def _add_product(sum_VD: torch.Tensor, left_VC: torch.Tensor, right_CD: torch.Tensor) -> None:
    """Add a product of bf16 matrices to an fp32 sum in place: on a GPU in one pass, and without rounding it before."""
    if sum_VD.is_cuda and left_VC.dtype != torch.float32:
        torch.addmm(sum_VD, left_VC, right_CD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD += left_VC @ right_CD
