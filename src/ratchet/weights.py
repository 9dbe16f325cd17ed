"""Published policies: weights/step_v, a Hugging Face model directory that inference adopts.

One writer, the trainer. A policy's name on the wire is `<run id>/<lineage>/<step>/<digest>`; adoption
tests equality of that name, never order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ratchet import durable
from ratchet.paths import RunPaths
from ratchet.records import Manifest
from ratchet.stage import Stage

# What may differ between two files that describe the same network.
_COSMETIC = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}

_FACTS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)


class Policy(msgspec.Struct, frozen=True):
    """One published policy, as the wire names it."""

    run_id: str
    lineage: int
    step: int
    digest: str

    def __str__(self) -> str:
        return f"{self.run_id}/{self.lineage}/{self.step}/{self.digest}"

    @classmethod
    def parse(cls, text: str) -> "Policy | None":
        """The policy that a server reports, or None for a name that is not ours (`default`)."""
        parts = text.split("/")
        if len(parts) != 4 or not parts[1].isdigit() or not parts[2].isdigit():
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]), parts[3])


def digest(manifest: Manifest) -> str:
    return durable.payload_digest(manifest.files)


def describe(directory: Path, *, step: int, attempt: int) -> Manifest:
    """Seal a staged model directory; returns what its manifest will say."""
    return Manifest(kind="weights", step=step, attempt=attempt, files=tuple(durable.seal(directory)))


def commit(stage: Stage, directory: Path, *, step: int, attempt: int) -> Manifest:
    """Publish a staged model directory as weights/step_{step}.

    The same content under that name already is a no-op.
    Raises: Fenced; RatchetError if other content stands under that name: the trainer moves it aside before.
    """
    return stage.commit(directory, stage.paths.weight(step), describe(directory, step=step, attempt=attempt))


def read_policy(paths: RunPaths, step: int, *, run_id: str, lineage: int) -> Policy | None:
    """The published policy of `step`, or None if there is none yet."""
    manifest = durable.read_committed(paths.weight(step))
    return None if manifest is None else Policy(run_id, lineage, step, digest(manifest))


def is_published(paths: RunPaths, step: int) -> bool:
    """Whether policy `step` is there, whole; its hashes are not read."""
    return (paths.weight(step) / durable.MANIFEST).exists()


def newest(paths: RunPaths, *, above: int) -> int | None:
    """The newest published step above `above`: steps are published one after the other."""
    step = above
    while is_published(paths, step + 1):
        step += 1
    return step if step > above else None


def architecture_digest(config: Mapping[str, Any]) -> str:
    """Equal for two `config.json` that describe the same network; a server of another one is refused."""
    essential = {k: v for k, v in config.items() if k not in _COSMETIC}
    return durable.hash_bytes(msgspec.json.encode(essential, order="deterministic"))


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a person tells two networks apart, where the config states them."""
    return {key: config[key] for key in _FACTS if key in config}


def read_facts(directory: Path) -> dict[str, Any]:
    return facts(msgspec.json.decode((directory / "config.json").read_bytes()))
