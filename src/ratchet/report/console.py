"""What a person sees while a run goes on: a progress bar on a terminal, lines elsewhere, a summary at the end.

It follows the metric files, so it needs nothing from the programs and cannot disturb them.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ratchet import metrics
from ratchet.metrics import Row
from ratchet.paths import RunPaths
from ratchet.report.curve import curve


class Follower:
    """Yields the rows that were appended to a metric file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def fresh(self) -> list[Row]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [msgspec.json.decode(line) for line in whole.splitlines()]


class Console:
    """The display of one attempt. Use as a context manager around the run."""

    def __init__(self, paths: RunPaths, kind: str, max_steps: int, log: IO[str]) -> None:
        self._paths = paths
        self._kind = kind
        self._max_steps = max_steps
        self._log = log
        self._rich = RichConsole(file=sys.stderr, no_color="NO_COLOR" in os.environ, highlight=False)
        self._followers = {
            role: Follower(paths.metric(role)) for role in ("trainer", "orchestrator", "evals")
        }
        self._rewards: dict[int, float] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._rich,
            disable=not self._rich.is_terminal,
        )
        rows = metrics.read(paths.metric("trainer"))
        self._task = self._progress.add_task(
            kind, total=max_steps, completed=rows[-1]["step"] if rows else 0, note="starting"
        )

    def __enter__(self) -> "Console":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One message, to the person and to the launcher's log."""
        self._rich.print(text, markup=False, soft_wrap=True)
        self._log.write(text + "\n")
        self._log.flush()

    def refresh(self) -> None:
        """Show what the programs have recorded since the last call."""
        for row in self._followers["orchestrator"].fresh():
            self._rewards[row["step"]] = row.get("reward/mean", float("nan"))
        for row in self._followers["trainer"].fresh():
            self._show_step(row)
        for row in self._followers["evals"].fresh():
            self.say(f"eval of policy {row['step']}: {_pairs(row, 'eval/')}")

    def _show_step(self, row: Row) -> None:
        step = row["step"]
        note = f"loss {row['loss']:.4f}"
        if step in self._rewards:
            note = f"reward {self._rewards[step]:.3f}  {note}"
        note += f"  lr {row['lr']:.2e}  {row.get('perf/tokens_per_s', 0):,.0f} tok/s"
        self._progress.update(self._task, completed=step, note=note)
        line = f"step {step}/{self._max_steps}  {note}"
        if self._rich.is_terminal:
            self._log.write(line + "\n")
        else:
            self.say(line)

    def follow_again(self, role: str) -> None:
        """A metric file was cut back: what is appended to it from now on is shown."""
        self._followers[role] = Follower(self._paths.metric(role))

    def summarize(self, restarts: Mapping[str, int]) -> None:
        """The closing summary: the curve, first and last figures, where everything lies."""
        trainer = metrics.read(self._paths.metric("trainer"))
        if not trainer:
            return
        source, key = ("orchestrator", "reward/mean") if self._kind == "rl" else ("trainer", "loss")
        values = [row[key] for row in metrics.read(self._paths.metric(source)) if key in row]
        lines = [f"{key} by step", curve(values)]
        if values:
            lines.append(f"{key}: {values[0]:.3f} -> {values[-1]:.3f}")
        lines += _eval_lines(metrics.read(self._paths.metric("evals")))
        last: dict[str, Any] = trainer[-1]
        lines.append(
            f"{last['step']} steps, {last.get('progress/total_samples', 0):,} samples, "
            f"{last.get('progress/total_tokens', 0):,} tokens"
        )
        if restarts:
            lines.append("restarts: " + ", ".join(f"{role} {count}" for role, count in restarts.items()))
        lines.append(f"model: {self._paths.weight(last['step'])}   everything: {self._paths.root}")
        self.say("\n".join(lines))


def _eval_lines(rows: list[Row]) -> list[str]:
    """First against last evaluation, a line for each quantity."""
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    keys = [key for key in first if key.startswith("eval/") and key in last]
    return [
        f"{key}: {first[key]:.3f} (policy {first['step']}) -> {last[key]:.3f} (policy {last['step']})"
        for key in keys
    ]


def _pairs(row: Row, prefix: str) -> str:
    return "  ".join(f"{k.removeprefix(prefix)} {v:.3f}" for k, v in row.items() if k.startswith(prefix))
