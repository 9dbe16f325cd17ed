"""`ckpt`: look at the checkpoints of a run. Needs no torch, so it answers at once."""

import argparse
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from ratchet import digest, durable, process
from ratchet.errors import EXIT_OK, EXIT_REFUSED, Damaged, Refusal
from ratchet.paths import RunPaths, step_name


class Row(msgspec.Struct):
    """One checkpoint, as `ckpt ls` shows it."""

    step: int
    when: str
    size_bytes: int
    parts: list[str]
    sound: bool
    problem: str = ""


def main() -> None:
    """Entry point of the `ckpt` command."""
    process.run(_main)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="ckpt", description="Look at the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("ls", "list the checkpoints of a run"),
        ("verify", "read every byte of every checkpoint, batch and policy and compare with its manifest"),
        ("digest", "one digest of everything that must be equal in two equal runs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", type=Path, help="the run directory")
        command.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    if not (arguments.run / "attempts").is_dir():
        raise Refusal(f"{arguments.run} is not a run directory: it has no attempts/.")
    commands_by_name = {"ls": _ls, "verify": _verify, "digest": _digest}
    return commands_by_name[arguments.command](RunPaths(arguments.run), arguments.json)


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


def _ls(paths: RunPaths, as_json: bool) -> int:
    rows = [_row(paths, step) for step in durable.steps(paths.checkpoints)]
    if as_json:
        sys.stdout.write(msgspec.json.encode(rows).decode() + "\n")
        return EXIT_OK
    if not rows:
        sys.stdout.write(f"{paths.root} has no checkpoints.\n")
        return EXIT_OK
    table = Table(title=str(paths.root), title_justify="left")
    for column in ("step", "saved", "size", "parts", "sound"):
        table.add_column(column, justify="right" if column in ("step", "size") else "left")
    for row in rows:
        size = f"{row.size_bytes / 1e6:,.1f} MB"
        table.add_row(
            str(row.step), row.when, size, ", ".join(row.parts), "yes" if row.sound else row.problem
        )
    Console().print(table)
    return EXIT_OK


def _verify(paths: RunPaths, as_json: bool) -> int:
    """Exit 2 if anything is damaged."""
    problems, checked = [], 0
    for root in (paths.checkpoints, paths.batches, paths.weights, paths.evals):
        for step in durable.steps(root):
            checked += 1
            try:
                durable.verify(root / step_name(step))
            except Damaged as error:
                problems.append(str(error))
    if as_json:
        result = {"checked": checked, "problems": problems}
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        lines = [*problems, f"{checked} directories read, {len(problems)} damaged"]
        sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_REFUSED if problems else EXIT_OK


def _digest(paths: RunPaths, as_json: bool) -> int:
    found = digest.parts(paths.root)
    if as_json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        lines = [*(f"{value}  {name}" for name, value in found.items()), digest.run_digest(paths.root)]
        sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK
