"""From logits to tokens: each request draws from a stream of its own, so no other request moves it.

Axes: S slots, V vocabulary.
"""

import numpy as np
import torch


def draw_uniforms(seed: int, count: int) -> np.ndarray:
    """The draws of one request; the i-th decides its i-th token. A prefix of a longer list is the same.

    Philox with the whole 64-bit seed as its key: torch's CPU generator would keep only the lower 32 bits.
    Shapes: -> (count,) float64 in [0, 1)
    """
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).random(count)


@torch.inference_mode()
def sample(
    logits_SV: torch.Tensor, temperatures_S: torch.Tensor, uniforms_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverse CDF, with its log-probability under the distribution it was drawn from.

    Temperature 0 takes the most probable token, with its log-probability at temperature 1. Rows do not meet:
    every operation runs along V. A row of non-finite logits has a log-probability that is not finite.
    Shapes: (S, V), (S,) float64, (S,) float64 -> (S,) int64, (S,) float64
    """
    temperatures_S, uniforms_S = temperatures_S.to(logits_SV.device), uniforms_S.to(logits_SV.device)
    is_greedy_S = temperatures_S == 0
    scales_S = torch.where(is_greedy_S, 1.0, temperatures_S)
    logprobs_SV = (logits_SV.double() / scales_S[:, None]).log_softmax(-1)
    cdf_SV = logprobs_SV.exp().cumsum(-1)
    # The last entry, not 1: rounding must not leave a gap at the end.
    targets_S1 = uniforms_S[:, None] * cdf_SV[:, -1:]
    drawn_S1 = torch.searchsorted(cdf_SV, targets_S1, right=True).clamp_(max=logits_SV.shape[-1] - 1)
    tokens_S1 = torch.where(is_greedy_S[:, None], logits_SV.argmax(-1, keepdim=True), drawn_S1)
    return tokens_S1.squeeze(-1), logprobs_SV.gather(-1, tokens_S1).squeeze(-1)
