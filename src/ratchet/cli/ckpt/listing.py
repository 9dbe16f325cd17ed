"""`ckpt ls`, `show`, `verify`, `digest`: what is there, and whether it is sound."""

import argparse
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from ratchet import attempts, audit, checkpoint, digest, durable, journal, ledger
from ratchet.cli.ckpt.output import check_step, megabytes, say
from ratchet.errors import EXIT_OK, EXIT_REFUSED, Damaged
from ratchet.inputs import history
from ratchet.paths import RunPaths, step_name

SCHEDULER = f"{checkpoint.TRAINER}/scheduler.json"


class Row(msgspec.Struct):
    """One checkpoint, as `ckpt ls` shows it."""

    step: int
    when: str
    size_bytes: int
    parts: list[str]
    sound: bool
    kept_because: list[str] = []
    problem: str = ""


class Aside(msgspec.Struct):
    """What one attempt moved aside."""

    attempt: str
    size_bytes: int
    entries: dict[str, int]
    """How many steps of each kind; for metrics and ledger, files."""


def ls(arguments: argparse.Namespace) -> int:
    paths = RunPaths(arguments.run)
    rows = [_row(paths, step) for step in durable.steps(paths.checkpoints)]
    _explain(paths, rows)
    aside = _superseded(paths)
    if arguments.json:
        say({"checkpoints": rows, "superseded": aside}, (), as_json=True)
        return EXIT_OK
    if rows:
        Console().print(_table(paths, rows))
    lines = [] if rows else [f"{paths.root} has no checkpoints."]
    for entry in aside:
        parts = ", ".join(f"{count} {name}" for name, count in entry.entries.items())
        lines.append(f"superseded/{entry.attempt}: {parts} ({megabytes(entry.size_bytes)})")
    if lines:
        say(None, lines, as_json=False)
    return EXIT_OK


def _row(paths: RunPaths, step: int) -> Row:
    directory = paths.checkpoint(step)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(directory.stat().st_mtime))
    try:
        manifest = durable.read_manifest(directory)
        durable.check_sizes(directory, manifest)
    except Damaged as error:
        return Row(step, when, 0, [], sound=False, problem=str(error))
    found = sorted({file.name.split("/")[0] for file in manifest.files})
    return Row(step, when, sum(file.size for file in manifest.files), found, sound=True)


def _explain(paths: RunPaths, rows: list[Row]) -> None:
    """Say which rule of the newest attempt keeps each checkpoint."""
    record = attempts.newest(paths)
    ckpt = attempts.read_config(paths, record).ckpt if record is not None else None
    sound = [row.step for row in rows if row.sound]
    for row in rows:
        if row.sound:
            row.kept_because = checkpoint.reasons(row.step, sound, ckpt)


def _table(paths: RunPaths, rows: list[Row]) -> Table:
    table = Table(title=str(paths.root), title_justify="left")
    for column in ("step", "saved", "size", "parts", "sound", "kept because"):
        table.add_column(
            column, justify="right" if column in ("step", "size") else "left", no_wrap=column == "saved"
        )
    for row in rows:
        sound = "yes" if row.sound else row.problem
        parts, why = ", ".join(row.parts), ", ".join(row.kept_because)
        table.add_row(str(row.step), row.when, megabytes(row.size_bytes), parts, sound, why)
    return table


def _superseded(paths: RunPaths) -> list[Aside]:
    if not paths.superseded.exists():
        return []
    return [_aside(directory) for directory in sorted(paths.superseded.iterdir()) if directory.is_dir()]


def _aside(directory: Path) -> Aside:
    files = [path for path in directory.rglob("*") if path.is_file()]
    entries = {part.name: len(list(part.iterdir())) for part in sorted(directory.iterdir()) if part.is_dir()}
    return Aside(directory.name, sum(path.stat().st_size for path in files), entries)


def show(arguments: argparse.Namespace) -> int:
    """One checkpoint, by its manifest and its small files; every byte of those is verified by `verify`."""
    paths, step = RunPaths(arguments.run), arguments.step
    check_step(paths, step)
    directory = paths.checkpoint(step)
    manifest = durable.read_manifest(directory)
    schema, read = manifest.meta.get("schema", {}), checkpoint.inputs(paths, step)
    value: dict[str, Any] = {
        "step": step,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "hash": manifest.hash,
        "versions": manifest.versions,
        "inputs": {"digest": read.digest, **history.leaves(read)} if read else None,
        "accepted": {entry.group: str(entry) for entry in read.accepted} if read and read.accepted else None,
        "progress": _read_json(directory / audit.PROGRESS),
        "learning_rate": _read_json(directory / SCHEDULER),
        "orchestrator": _orchestrator(directory),
        "tensors": len(schema),
        "parts": {file.name: file.size for file in manifest.files},
    }
    lines = [f"checkpoints/{step_name(step)} of {paths.root}"]
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [key, *(f"  {name:<28} {inner}" for name, inner in item.items())]
        elif item is not None:
            lines.append(f"{key:<30} {item}")
    say(value, lines, as_json=arguments.json)
    return EXIT_OK


def _read_json(path: Path) -> Any:
    return msgspec.json.decode(path.read_bytes()) if path.exists() else None


def _orchestrator(directory: Path) -> dict[str, Any] | None:
    """The counters of the orchestrator's part; None for SFT."""
    path = directory / checkpoint.STATE
    if not path.exists():
        return None
    state = ledger.read_state(path.read_bytes())
    return {
        "next_draw": state.next_draw,
        "running": len(state.running),
        "ready": len(state.ready),
        "dropped": state.dropped,
        "drawn": {env.label: env.drawn for env in state.envs},
    }


def verify(arguments: argparse.Namespace) -> int:
    """Exit 2 if anything is damaged."""
    paths = RunPaths(arguments.run)
    problems, checked = [], 0
    for root in (paths.checkpoints, paths.batches, paths.weights, paths.evals):
        for step in durable.steps(root):
            checked += 1
            try:
                durable.verify(root / step_name(step))
            except Damaged as error:
                problems.append(str(error))
    for number in attempts.numbers(paths):
        checked += 1
        try:
            attempts.read_config(paths, attempts.read(paths, number))
        except Damaged as error:
            problems.append(str(error))
    segments = journal.segments(paths)
    problems += journal.damaged(paths).values()
    what = f"{checked} directories and {len(segments)} journal segments read"
    lines = [*problems, f"{what}, {len(problems)} damaged"]
    say({"checked": checked, "problems": problems}, lines, as_json=arguments.json)
    return EXIT_REFUSED if problems else EXIT_OK


def digests(arguments: argparse.Namespace) -> int:
    """Nothing is said that may differ between two equal runs."""
    found, whole = digest.result(arguments.run), digest.run_digest(arguments.run)
    lines = [f"{value}  {name}" for name, value in found.items()]
    say({"digest": whole, "parts": found}, [*lines, whole], as_json=arguments.json)
    return EXIT_OK
