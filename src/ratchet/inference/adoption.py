"""New weights while requests are in flight: verified and read completely before the model is touched."""

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ratchet import durable, weights
from ratchet.errors import Damaged, Refusal

UNLABELLED = "unlabelled"
"""The version of weights that were loaded and not yet named: no token is sampled under it."""


class OutOfSequence(Refusal):
    """A call that does not fit what was called before it, or weights that do not fit this server."""


def architecture(config: PreTrainedConfig) -> str:
    """The network that a config describes, whoever wrote its file."""
    return weights.architecture_digest(msgspec.json.decode(config.to_json_string(use_diff=False)))


def read(directory: Path, expected_architecture: str) -> dict[str, torch.Tensor]:
    """The tensors of a published policy.

    Raises: Damaged if a byte is not what the manifest says; OutOfSequence if it describes another network.
    """
    manifest = durable.verify(directory)
    try:
        found = architecture(AutoConfig.from_pretrained(directory))
    except (OSError, ValueError) as error:
        raise Damaged(f"{directory} has no readable config.json: {error}.") from None
    if found != expected_architecture:
        raise OutOfSequence(
            f"{directory} (step {manifest.step}) describes another network than the one served here: start a server "
            "with that model."
        )
    try:
        return read_tensors(directory)
    except (OSError, SafetensorError) as error:
        raise Damaged(f"The tensors of {directory} cannot be read: {error}.") from None


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, by name, on the CPU. Tied ones are there once."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def match(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Which tensor goes where: each of the model's once, tied ones under any of their names.

    Raises: Refusal naming what is missing, unknown, misshapen, or tied here and unequal there.
    """
    places: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        places.setdefault(id(tensor), []).append(name)
    if unknown := sorted(set(tensors) - set(state)):
        raise Refusal(f"The file has tensors that the model does not know: {', '.join(unknown[:3])}.")
    pairs = []
    for names in places.values():
        there = [name for name in names if name in tensors]
        if not there:
            raise Refusal(f"The file lacks the tensor {names[0]}.")
        target, source = state[names[0]], tensors[there[0]]
        if source.shape != target.shape:
            raise Refusal(f"{there[0]} has shape {list(source.shape)}; the model's is {list(target.shape)}.")
        if any(not torch.equal(source, tensors[name]) for name in there[1:]):
            raise Refusal(f"{' and '.join(there)} are one tensor in the model, and two in the file.")
        pairs.append((target, source))
    return pairs


def copier(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """Copy checked tensors into the model, in place. Raises: Refusal (see `match`), before anything changes."""
    pairs = match(model, tensors)

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return copy


class UpdateSequence:
    """Which call of an update comes next: pause, start, update, finish, resume.

    A client may die anywhere in between: the next one pauses again and starts over.
    """

    def __init__(self) -> None:
        self.is_started = False
        self.is_unlabelled = False

    def start(self, *, is_paused: bool) -> None:
        if not is_paused:
            raise OutOfSequence("The server is not paused: POST /pause first.")
        self.is_started = True

    def check_update(self, *, is_paused: bool) -> None:
        if not (self.is_started and is_paused):
            raise OutOfSequence("No weight update was started: POST /pause and /start_weight_update first.")

    def loaded(self) -> None:
        self.is_unlabelled = True

    def finish(self) -> None:
        if not (self.is_started and self.is_unlabelled):
            raise OutOfSequence(
                "No weights were loaded since the update was started: POST /update_weights first."
            )
        self.is_started = self.is_unlabelled = False

    def resume(self) -> None:
        if self.is_unlabelled:
            raise OutOfSequence(
                "The weights that were loaded have no version yet: POST /finish_weight_update, or start over."
            )
        self.is_started = False
