"""Published policies: weights/step_v, a Hugging Face model directory that inference adopts.

It lies in the run directory, and with `weights.transport = "memory"` first, for some of them only, in shared memory of
the trainer's machine (`memory`); `Places` is the one answer to where.

One writer, the trainer. A policy's name on the wire is `<run id>/<lineage>/<step>/<digest>`; adoption
tests equality of that name, never order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ratchet import durable
from ratchet.paths import RunPaths
from ratchet.records import FileEntry, Manifest
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


def describe(
    directory: Path, *, step: int, attempt: int, sealed: Sequence[FileEntry] | None = None
) -> Manifest:
    """What the manifest of a staged model directory will say; its files are sealed, unless they are already."""
    files = tuple(durable.seal(directory) if sealed is None else sealed)
    return Manifest(kind="weights", step=step, attempt=attempt, files=files)


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


@dataclass(frozen=True)
class Places:
    """Where the policies of a run lie: in memory of the trainer's machine, if they go that way, and on the disk.

    In memory are all that a server may still need since the attempt began, on the disk those that outlive it. The
    same policy has the same bytes in both, and so the same name.
    """

    disk: RunPaths
    memory: RunPaths | None = None
    are_all_on_disk: bool = True
    """Every policy comes onto the disk, a little later than into memory."""

    @property
    def _all(self) -> tuple[RunPaths, ...]:
        return (self.disk,) if self.memory is None else (self.memory, self.disk)

    def read_policy(self, step: int, *, run_id: str, lineage: int) -> Policy | None:
        """The policy of `step`, in memory or else on the disk; None if it is not published."""
        found = (read_policy(paths, step, run_id=run_id, lineage=lineage) for paths in self._all)
        return next((policy for policy in found if policy is not None), None)

    def directories(self, policy: Policy) -> list[Path]:
        """The directories that hold exactly this policy, that in memory first."""
        found = []
        for paths in self._all:
            manifest = durable.read_committed(paths.weight(policy.step))
            if manifest is not None and digest(manifest) == policy.digest:
                found.append(paths.weight(policy.step))
        return found

    def is_published(self, step: int) -> bool:
        """Whether policy `step` is there, whole; its hashes are not read."""
        return any(is_published(paths, step) for paths in self._all)

    def steps(self) -> list[int]:
        """Every step of which something is published, in order."""
        return sorted({step for paths in self._all for step in durable.steps(paths.weights)})

    def is_passed(self, step: int) -> bool:
        """Whether the trainer has published beyond `step`: what is not there then does not come any more.

        In memory it begins anew with each attempt, while on the disk later policies may lie since the one before.
        """
        return any(other > step for other in durable.steps(self._all[0].weights))

    def newest(self, *, above: int) -> int | None:
        """The newest step above `above`, which was published since the attempt began."""
        if self.memory is None:  # one after the other: no directory is listed
            step = above
            while is_published(self.disk, step + 1):
                step += 1
            return step if step > above else None
        listed = (step for step in reversed(durable.steps(self.memory.weights)) if step > above)
        return next((step for step in listed if is_published(self.memory, step)), None)


def architecture_digest(config: Mapping[str, Any]) -> str:
    """Equal for two `config.json` that describe the same network; a server of another one is refused."""
    essential = {k: v for k, v in config.items() if k not in _COSMETIC}
    return durable.hash_bytes(msgspec.json.encode(essential, order="deterministic"))


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a person tells two networks apart, where the config states them."""
    return {key: config[key] for key in _FACTS if key in config}


def read_facts(directory: Path) -> dict[str, Any]:
    return facts(msgspec.json.decode((directory / "config.json").read_bytes()))
