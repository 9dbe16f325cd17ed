"""New weights while requests are in flight: verified and read completely before the model is touched."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ratchet import durable, weights
from ratchet.errors import Damaged, Refusal
from ratchet.models import naming, tensor_file
from ratchet.records import Manifest

_TENSORS = ".safetensors"
UNLABELLED = "unlabelled"
"""The version of weights that were loaded and not yet named: no token is sampled under it."""


class Unseen(Refusal):
    """None of the directories that were given is there, as this machine sees it."""


class OutOfSequence(Refusal):
    """A call that does not fit what was called before it, or weights that do not fit this server."""


def architecture(config: PreTrainedConfig) -> str:
    """The network that a config describes, whoever wrote its file."""
    return weights.architecture_digest(msgspec.json.decode(config.to_json_string(use_diff=False)))


@dataclass(frozen=True)
class Wanted:
    """Which policy a client asks for."""

    paths: tuple[str, ...]
    """Directories that hold it, the best first; this machine may see the last one only."""
    digest: str | None = None
    """Of its files. A client that gives none takes what stands there."""
    is_choice: bool = False
    """The client knows that a directory may not be seen here."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "Wanted":
        """From the body of `/update_weights`. Raises: Refusal"""
        info = body.get("update_info")
        info = info if isinstance(info, dict) else {}
        choice = info.get("paths")
        paths = choice or [info.get("path")]
        digest = info.get("digest")
        known = [path for path in paths if isinstance(path, str) and path] if isinstance(paths, list) else []
        if not known:
            raise Refusal('The body must be {"update_info": {"path": "<a published weights directory>"}}.')
        return cls(tuple(known), digest if isinstance(digest, str) and digest else None, bool(choice))

    def read(self, expected_architecture: str) -> tuple[Path, dict[str, torch.Tensor]]:
        """Its tensors, and where they lay. Raises: Unseen; Damaged; OutOfSequence (see `read`)"""
        places = [Path(path) for path in self.paths]
        there = [place for place in places if (place / durable.MANIFEST).exists()]
        if not there and self.is_choice:
            raise Unseen(
                f"This machine sees none of {', '.join(self.paths)}: where inference is on another machine than the "
                "trainer, set weights.publish_interval = 1 and share the run directory."
            )
        *others, last = there or places
        for directory in others:
            with contextlib.suppress(Damaged):  # the next one may be sound
                return directory, read(directory, expected_architecture, self.digest)
        return last, read(last, expected_architecture, self.digest)


def read(directory: Path, expected_architecture: str, digest: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a published policy, on the CPU, for as long as they are kept: views of its files' pages.

    Raises: Damaged if a byte is not what the manifest says, or it is another policy than that of this digest;
    OutOfSequence if it describes another network.
    """
    manifest = durable.read_manifest(directory)
    if digest is not None and weights.digest(manifest) != digest:
        raise Damaged(
            f"{directory} holds another policy than the one of digest {digest}, which was asked for."
        )
    tensors = read_tensors(directory, manifest)
    try:
        found = architecture(AutoConfig.from_pretrained(directory))
    except (OSError, ValueError) as error:
        raise Damaged(f"{directory} has no readable config.json: {error}.") from None
    if found != expected_architecture:
        raise OutOfSequence(
            f"{directory} (step {manifest.step}) describes another network than the one served here: start a server "
            "with that model."
        )
    return tensors


def read_tensors(directory: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """All tensors of a published model, by name; tied ones are there once. Every file is verified. Raises: Damaged"""
    durable.check_sizes(directory, manifest)
    durable.check_hashes(directory, [e for e in manifest.files if not e.name.endswith(_TENSORS)])
    tensors: dict[str, torch.Tensor] = {}
    for entry in manifest.files:
        if entry.name.endswith(_TENSORS):
            tensors |= tensor_file.read(directory, entry)
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
    pairs = match(model, naming.inward(model, tensors))

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
