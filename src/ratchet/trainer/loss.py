"""The two losses, as functions of token log-probabilities. Sums: the caller divides by the step's tokens.

Axes: N = trained tokens of a micro-batch. Where `counts_N`, bool, is given, some of them only fill it up.
"""

from dataclasses import dataclass

import torch

from ratchet.config import LossConfig


@dataclass(frozen=True)
class LossSum:
    """The loss summed over tokens, and sums of what is reported; divide each by the step's token count."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def cross_entropy(logprobs_N: torch.Tensor, counts_N: torch.Tensor | None = None) -> LossSum:
    """SFT: the negative log-likelihood of the demonstration. Shapes: (N,) float32 -> ()"""
    if counts_N is not None:
        logprobs_N = torch.where(counts_N, logprobs_N, 0.0)
    return LossSum(-logprobs_N.sum(), {})


def policy_gradient(
    logprobs_N: torch.Tensor,
    behaviour_N: torch.Tensor,
    advantages_N: torch.Tensor,
    config: LossConfig,
    counts_N: torch.Tensor | None = None,
) -> LossSum:
    """RL: the clipped surrogate against the policy that sampled each token.

    A token whose ratio is extreme carries no information about the sampler's choice and is left out; it still
    counts in the mean, so that leaving out does not make the others heavier. `policy/entropy` is estimated from the
    tokens that were sampled: unbiased where the policy that sampled is the one that trains.

    Shapes: (N,) float32, (N,) float32, (N,) float32 -> ()
    Source: PPO, arXiv:1707.06347; clip-higher, arXiv:2503.14476
    """
    if counts_N is not None:
        logprobs_N, behaviour_N, advantages_N = (
            torch.where(counts_N, one, 0.0) for one in (logprobs_N, behaviour_N, advantages_N)
        )
    difference_N = logprobs_N - behaviour_N
    ratio_N = difference_N.exp()
    is_kept_N = ((ratio_N >= config.mask_low) & (ratio_N <= config.mask_high)).detach()
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    loss = -torch.where(is_kept_N, surrogate_N, 0.0).sum()
    with torch.no_grad():
        is_clipped_N = is_kept_N & (clipped_N * advantages_N < ratio_N * advantages_N)
        metrics = {
            "policy/mismatch_kl": (ratio_N - 1 - difference_N).sum(),
            "policy/entropy": -logprobs_N.sum(),
            "policy/ratio_mean": (ratio_N if counts_N is None else ratio_N * counts_N).sum(),
            "policy/clipped_fraction": is_clipped_N.sum().float(),
            "policy/masked_fraction": (~is_kept_N).sum().float(),
        }
    return LossSum(loss, metrics)
