"""The one definition of "the same run": payloads only, nothing that a clock, an attempt or a fault touches."""

from pathlib import Path
from typing import Any

import msgspec

from ratchet import batchlog, checkpoint, durable, ledger, metrics
from ratchet.paths import RunPaths, parse_step, step_name
from ratchet.records import FileEntry, Manifest

# DCP's own index holds the path and a random id of each save; the shards beside it hold the state.
_NOT_PAYLOAD = {f"{checkpoint.TRAINER}/.metadata"}
_PRUNED = ("batches", "checkpoints", "weights")


def _hash(value: Any) -> str:
    return durable.hash_bytes(msgspec.json.encode(value, order="deterministic"))


def _payload(files: tuple[FileEntry, ...]) -> str:
    return durable.payload_digest(f for f in files if f.name not in _NOT_PAYLOAD)


def _batch(directory: Path, manifest: Manifest) -> str:
    return _hash([batchlog.payload(manifest), metrics.exact(batchlog.read_metrics(directory))])


def parts(root: Path) -> dict[str, str]:
    """A digest for each published thing and each metric file of a run, by name."""
    paths = RunPaths(root)
    found: dict[str, str] = {}
    for step, manifest in durable.committed(paths.batches).items():
        found[f"batches/{step_name(step)}"] = _batch(paths.batch(step), manifest)
    for directory in (paths.checkpoints, paths.weights, paths.evals):
        for step, manifest in durable.committed(directory).items():
            found[f"{directory.name}/{step_name(step)}"] = _payload(manifest.files)
    for role in ("trainer", "orchestrator", "evals"):
        rows = [metrics.exact(row) for row in metrics.read(paths.metric(role))]
        if rows:
            found[f"metrics/{role}"] = _hash(rows)
    if end := ledger.chain_end(paths.ledger):
        found["ledger"] = end
    return found


def result(found: dict[str, str]) -> dict[str, str]:
    """The parts that must be equal in two equal runs.

    Of batches, checkpoints and weights these are the newest: which others are there depends on when a run was stopped
    (a checkpoint is saved there), and on how far a server was behind. What led to the newest is in the ledger, whose
    lines hold the digest of each batch, and in the rows.
    """
    newest: dict[str, int] = {}
    for name in found:
        root, _, last = name.partition("/")
        if root in _PRUNED:
            newest[root] = max(newest.get(root, 0), parse_step(last) or 0)
    keep = {f"{root}/{step_name(step)}" for root, step in newest.items()}
    return {n: d for n, d in found.items() if n.partition("/")[0] not in newest or n in keep}


def run_digest(root: Path) -> str:
    """Equal for two runs whose ledger, rows, evaluations, and newest batch, weights and checkpoint are equal."""
    return _hash(result(parts(root)))
