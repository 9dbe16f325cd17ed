"""A model as it is trained: with adapters beside a frozen base, or with parameters that keep their values."""

import re
from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel

from ratchet.config import ModelConfig
from ratchet.errors import Refusal
from ratchet.models import adapters
from ratchet.models.build import build, frame


def build_trainable(model: ModelConfig, *, seed: int) -> tuple[PreTrainedModel, str | None]:
    """The model of a configuration, whole and on the CPU; and the digest of its base where it has adapters.

    Raises: Refusal
    """
    module = build(model, seed=seed)
    if model.lora is not None:
        base = adapters.digest(module)
        adapters.attach(module, model.lora, seed)
        return module, base
    freeze(module, model.freeze)
    return module, None


def saved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that belong to the policy, such as the biases by which some routers choose experts."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def build_frame(model: ModelConfig, saved: Collection[str]) -> PreTrainedModel | None:
    """The model of a configuration with room for its values, which a checkpoint with the tensors `saved` gives it; None
    where that lacks some (buffers, in those of older versions). No weight is read or drawn.

    Raises: Refusal
    """
    module = frame(model)
    if any(f"model.{name}" not in saved for name in saved_buffers(module)):
        return None
    freeze(module, model.freeze)
    return module


def freeze(module: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Let the parameters in whose name a pattern is found keep their values; a shared one by either of its names.

    Raises: Refusal for a pattern that is found nowhere, or where nothing is left to train.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [parameter for name, parameter in named if re.search(pattern, name)]
        if not found:
            raise Refusal(
                f"model.freeze has {pattern!r}, which is found in no parameter's name (the first is {named[0][0]})."
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise Refusal("model.freeze leaves nothing to train: name fewer parameters.")
