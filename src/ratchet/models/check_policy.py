"""Whether the trainer's log-probabilities are those that the model means, shown by one short row before the first step.

The trainer takes hidden states from the body of a model and applies its head alone, in the attention that was asked
for, to rows that are padded at the right. Some families do more than that: they scale or cap logits or scores, or look
at what comes later. No list of them has to be right: the model's own forward pass, in eager attention, is asked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ratchet.errors import Refusal
from ratchet.models.logprobs import Policy

EAGER = "eager"
_TOKENS = 20
_PADDING = 4
_SPREAD = 8.0
"""Standard deviation of the logits that are compared: a cap does nothing to the small ones of an untrained model."""
_TOLERANCE = 1e-2
"""Nats. What is only rounded differently differs by 1e-4 at most, what is computed differently by more than 0.1."""
_Computation = Callable[[PreTrainedModel], torch.Tensor]
_UNABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_policy(model: PreTrainedModel) -> None:
    """Compare half of a row's tokens at least: in a mixture of experts rounding may send one of them elsewhere.

    Raises: Refusal if trainer and model differ.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _check(model)
    except _UNABLE as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise Refusal(
            f"{type(model).__name__} cannot be trained on rows of tokens ({reason}): choose a causal language model."
        ) from error
    finally:
        model.train(was_training)


def _check(model: PreTrainedModel) -> None:
    """Raises: Refusal"""
    asked = getattr(model.config, "_attn_implementation", EAGER)
    head: Any = model.get_output_embeddings()
    loud = _Loud()
    hook = head.register_forward_hook(loud)
    try:
        meant_N = _in_attention(EAGER, model, _own)
        loud.is_set = True
        # Kernels of other packages know settings that sdpa ignores, and need a GPU.
        gap = _gap(_in_attention("sdpa" if asked == "sdpa" else EAGER, model, _trained), meant_N)
        if gap <= _TOLERANCE:
            return
        name = type(model).__name__
        if asked == "sdpa" and _gap(_in_attention(EAGER, model, _trained), meant_N) <= _TOLERANCE:
            raise Refusal(
                f'model.attention = "sdpa" leaves out a part of the attention of {name}: log-probabilities differ from '
                f'the model\'s own by {gap:.1e} nats; set model.attention = "eager".'
            )
        raise Refusal(
            f"The trainer does not reproduce {name}, which is not causal, or does more to its logits than its head: "
            f"log-probabilities differ from the model's own by {gap:.1e} nats; choose another model."
        )
    finally:
        hook.remove()


class _Loud:
    """Hook of the head: multiplies its logits, by the factor that gives those of its first call the spread."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.is_set = False

    def __call__(self, head: nn.Module, given: object, logits: torch.Tensor) -> torch.Tensor:
        if not self.is_set:
            self.is_set = True
            self.factor = _SPREAD / max(float(logits.float().std()), 1e-6)
        return logits * self.factor


def _in_attention(name: str, model: PreTrainedModel, compute: _Computation) -> torch.Tensor:
    asked = getattr(model.config, "_attn_implementation", name)
    if name == asked:
        return compute(model)
    model.set_attn_implementation(name)
    try:
        return compute(model)
    finally:
        model.set_attn_implementation(asked)


def _row(model: PreTrainedModel) -> torch.Tensor:
    """Token ids. Shapes: -> (1, T) int64"""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _TOKENS + _PADDING
    length = max(2, min(_TOKENS, longest - _PADDING))
    ids = [(7 * i + 3) % config.vocab_size for i in range(length)]
    return torch.tensor([ids], device=model.device)


def _own(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities by the model's own forward pass. Shapes: -> (N,) float32"""
    ids_1T = _row(model)
    logits_NV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
    return -nn.functional.cross_entropy(logits_NV, ids_1T[0, 1:], reduction="none")


def _trained(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities as the trainer computes them. Shapes: -> (N,) float32"""
    ids_1T = _row(model)
    targets_N = ids_1T[0, 1:]
    cells_N = torch.arange(len(targets_N), device=model.device)
    return Policy(model)(nn.functional.pad(ids_1T, (0, _PADDING)), cells_N, targets_N, 1.0)


def _gap(a_N: torch.Tensor, b_N: torch.Tensor) -> float:
    return float((a_N - b_N).abs().median())
