"""The one definition of "the same run": payloads only, nothing that a clock, an attempt or a fault touches."""

from pathlib import Path
from typing import Any

import msgspec

from ratchet import batchlog, checkpoint, durable, ledger, metrics
from ratchet.inputs import history
from ratchet.paths import RunPaths, step_name
from ratchet.records import FileEntry, Manifest

# DCP's own index holds the path and a random id of each save; the shards beside it hold the state.
_NOT_PAYLOAD = {f"{checkpoint.TRAINER}/.metadata"}


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
    if lines := ledger.digest(paths.ledger):
        found["ledger"] = lines
    if (read := history.newest(paths)) is not None:
        found["inputs"] = read.digest
    return found


def result(root: Path) -> dict[str, str]:
    """The parts that must be equal in two equal runs whose ledgers one version wrote.

    What retention leaves of the others depends on when a run was stopped (a checkpoint is saved there), and on how far
    a server was behind. So of checkpoints and weights these are the newest, and a batch is none where its line in the
    ledger holds its digest: what led to the newest is in ledger and rows.
    """
    paths = RunPaths(root)
    stated, batches = ledger.payloads(paths.ledger), durable.committed(paths.batches)
    left_out = {
        paths.batch(step) for step, batch in batches.items() if stated.get(step) == batchlog.payload(batch)
    }
    for directory in (paths.checkpoints, paths.weights):
        left_out |= {directory / step_name(step) for step in list(durable.committed(directory))[:-1]}
    names = {str(path.relative_to(root)) for path in left_out}
    return {name: value for name, value in parts(root).items() if name not in names}


def run_digest(root: Path) -> str:
    """Equal for two runs whose batches, rows, evaluations, ledger, final weights and final checkpoint are equal."""
    return _hash(result(root))
