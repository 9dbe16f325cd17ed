"""What differs between two checkpoints, as far as that needs no tensors; and what a plan would cut."""

from pathlib import Path
from typing import Any

import msgspec

from ratchet import attempts, audit_rows, checkpoint, config_io, durable, ledger, metrics
from ratchet.attempts import Plan
from ratchet.inputs import history
from ratchet.inputs.tree import changed
from ratchet.paths import RunPaths

_FILES = (
    audit_rows.PROGRESS,
    f"{checkpoint.TRAINER}/scheduler.json",
    f"{checkpoint.TRAINER}/optimizer_steps.json",
)
_IGNORED = ("output_dir", "ckpt.resume_step")


class Difference(msgspec.Struct, frozen=True):
    """One setting or counter; `mark` says what a changed setting means on resume."""

    key: str
    a: Any
    b: Any
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.a!r} | {self.b!r}{f' ({self.mark})' if self.mark else ''}"


def settings(a: RunPaths, b: RunPaths) -> list[Difference]:
    """The configurations of the newest attempts; where a run lies is not compared. Raises: Damaged, Refusal."""
    first, second = attempts.newest(a), attempts.newest(b)
    if first is None or second is None or first.kind != second.kind:
        return [Difference("kind", first and first.kind, second and second.kind)]
    found = config_io.changes(attempts.read_config(a, first), attempts.read_config(b, second))
    return [Difference(c.key, c.old, c.new, c.mark.value) for c in found if c.key not in _IGNORED]


def inputs(a: RunPaths, at: int, b: RunPaths, bt: int) -> list[Difference]:
    """What two checkpoints' runs had read differently, leaf by leaf; nothing where one of them does not say it."""
    first, second = checkpoint.inputs(a, at), checkpoint.inputs(b, bt)
    if first is None or second is None:
        return []
    one, other = history.leaves(first), history.leaves(second)
    return [Difference(n, *pair) for n, pair in changed(one, other).items()]


def counters(a: Path, b: Path) -> list[Difference]:
    """The small files of two checkpoints, and the counters of the orchestrator's part."""
    first, second = _counters(a), _counters(b)
    keys = sorted({*first, *second})
    return [Difference(k, first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)]


def _counters(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _FILES:
        if (path := directory / name).exists():
            stem = path.stem
            found |= {f"{stem}.{k}": v for k, v in _flat(msgspec.json.decode(path.read_bytes()))}
    if (path := directory / checkpoint.STATE).exists():
        state = ledger.read_state(path.read_bytes())
        found["orchestrator.next_draw"] = state.next_draw
        found["orchestrator.in_flight"] = len(state.running) + len(state.ready)
        found["orchestrator.dropped"] = state.dropped
    return found


def _flat(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(key), item) for key, item in value.items()]
    return [("value", value)]


def has_equal_shards(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same tensors in the same bytes, by manifest: then none has to be read."""
    first, second = durable.read_manifest(a), durable.read_manifest(b)
    shards = [
        {file.name: file.xxh3 for file in manifest.files if file.name.endswith(".distcp")}
        for manifest in (first, second)
    ]
    return shards[0] == shards[1] and first.meta.get("schema") == second.meta.get("schema")


def cut_lines(paths: RunPaths, plan: Plan) -> dict[str, int]:
    """How many rows and lines a plan cuts, by file: those of a rollback are kept in superseded/."""
    if plan.complete:
        return {}
    found = {}
    for role, last in (("trainer", plan.step), ("orchestrator", plan.next_batch)):
        rows = metrics.read(paths.metric(role))
        found[f"metrics/{role}.jsonl"] = sum(row["step"] > last for row in rows)
    kept = ledger.lines_below(paths.ledger, plan.next_batch).count(b"\n")
    found["ledger/ledger.jsonl"] = len(ledger.raw_lines(paths.ledger)) - kept
    return found
