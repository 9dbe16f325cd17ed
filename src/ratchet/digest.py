"""The one definition of "the same run": payloads only, nothing that a clock, an attempt or a fault touches."""

from pathlib import Path
from typing import Any

import msgspec

from ratchet import batchlog, checkpoint, durable, metrics
from ratchet.paths import RunPaths, step_name
from ratchet.records import FileEntry, Manifest

# DCP's own index holds the path and a random id of each save; the shards beside it hold the state.
_NOT_PAYLOAD = {f"{checkpoint.TRAINER}/.metadata"}


def _hash(value: Any) -> str:
    return durable.hash_bytes(msgspec.json.encode(value, order="deterministic"))


def _payload(files: tuple[FileEntry, ...]) -> str:
    return durable.payload_digest(f for f in files if f.name not in _NOT_PAYLOAD)


def _batch(directory: Path, manifest: Manifest) -> str:
    hashes = {f.name: f.xxh3 for f in manifest.files}
    row = metrics.exact(batchlog.read_metrics(directory))
    return _hash([hashes[batchlog.SAMPLES], hashes[batchlog.STATE], row])


def parts(root: Path) -> dict[str, str]:
    """A digest for each published thing and each metric file of a run, by name.

    Weights count where they are part of the result: those of a checkpoint, and the newest. Which others are
    still there depends on how far a server was behind.
    """
    paths = RunPaths(root)
    found: dict[str, str] = {}
    for step, manifest in durable.committed(paths.batches).items():
        found[f"batches/{step_name(step)}"] = _batch(paths.batch(step), manifest)
    checkpoints = durable.committed(paths.checkpoints)
    for step, manifest in checkpoints.items():
        found[f"checkpoints/{step_name(step)}"] = _payload(manifest.files)
    weights = durable.committed(paths.weights)
    for step, manifest in weights.items():
        if step in checkpoints or step == max(weights):
            found[f"weights/{step_name(step)}"] = _payload(manifest.files)
    for step, manifest in durable.committed(paths.evals).items():
        found[f"evals/{step_name(step)}"] = _payload(manifest.files)
    for role in ("trainer", "orchestrator", "evals"):
        rows = [metrics.exact(row) for row in metrics.read(paths.metric(role))]
        if rows:
            found[f"metrics/{role}"] = _hash(rows)
    return found


def run_digest(root: Path) -> str:
    """Equal for two runs whose batches, weights, checkpoints, evaluations and metric rows are equal."""
    return _hash(parts(root))
