"""The policy as training sees it: token log-probabilities instead of logits.

Axes: B rows, T positions, V vocabulary, D hidden, N = tokens that are asked for.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ratchet.errors import Refusal

# Settings by which some models transform the head's output; `Policy` applies the head alone.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
CHUNK_TOKENS = 4096


class Policy(nn.Module):
    """A causal language model whose forward pass yields the log-probability of given next tokens.

    Only positions that count are projected to the vocabulary, and never more than `CHUNK_TOKENS` at once,
    so that the logits of a long batch do not have to fit in memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        unusual = [name for name in _LOGIT_SETTINGS if getattr(model.config, name, None)]
        if unusual:
            raise Refusal(f"Models that transform their logits ({', '.join(unusual)}) are not supported.")
        self.model = model

    def forward(
        self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, mask_BT: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Log-probability of each target that the mask selects, in row-major order.

        Rows are padded at the right; causal attention makes the padding invisible to the tokens before it.
        Shapes: (B, T) int64, (B, T) int64, (B, T) bool -> (N,) float32
        """
        hidden_BTD = self.model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        hidden_ND, targets_N = hidden_BTD[mask_BT], targets_BT[mask_BT]
        if len(targets_N) <= CHUNK_TOKENS:
            return self._project(hidden_ND, targets_N, temperature)
        parts = [
            checkpoint(self._project, hidden, targets, temperature, use_reentrant=False)
            for hidden, targets in zip(
                hidden_ND.split(CHUNK_TOKENS), targets_N.split(CHUNK_TOKENS), strict=True
            )
        ]
        return torch.cat(parts)  # pyright: ignore[reportArgumentType]

    def _project(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        assert head is not None
        logits_NV = head(hidden_ND).float() / temperature
        return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
