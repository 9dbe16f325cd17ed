"""What a person sees while a run goes on: one screen on a terminal, lines elsewhere, a summary at the end.

It reads the run directory only, so it needs nothing from the programs and cannot disturb them; `ratchet watch` is
the same screen without the run.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

import msgspec
from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from ratchet import metrics
from ratchet.attempts import Outcome
from ratchet.errors import Damaged
from ratchet.metrics import Row
from ratchet.paths import RunPaths
from ratchet.report.curve import curve
from ratchet.report.screen import screen
from ratchet.report.view import Watcher

DRAW_S = 0.5
CHECK_S = 5.0


def open_terminal(file: IO[str]) -> RichConsole:
    """Colours unless NO_COLOR is set; the width is the terminal's, or COLUMNS."""
    return RichConsole(file=file, no_color="NO_COLOR" in os.environ, highlight=False)


class Screen:
    """A live screen of one run on a terminal. Use as a context manager; `draw` looks at the run again."""

    def __init__(self, watcher: Watcher, console: RichConsole) -> None:
        self._console = console
        self._watcher = watcher
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop", transient=False)

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def draw(self, outcome: Outcome | None = None) -> bool:
        """Returns whether the run is open still. `outcome` is one that is about to be recorded."""
        try:
            view = self._watcher.look()
        except Damaged as error:
            self._live.update(Text(str(error)), refresh=True)
            return True
        if view is None:
            self._live.update(Text("No attempt has begun yet."), refresh=True)
            return True
        if outcome is not None:
            record = msgspec.structs.replace(view.record, outcome=outcome)
            view = dataclasses.replace(view, record=record, now=None)
        self._live.update(screen(view, self._console.width), refresh=True)
        return view.is_open


class Console:
    """The display of one attempt. Use as a context manager around the run."""

    def __init__(
        self, paths: RunPaths, kind: str, max_steps: int, log: IO[str], *, begins_at: int = 0
    ) -> None:
        self._paths = paths
        self._kind = kind
        self._max_steps = max_steps
        self._begins_at = begins_at
        self._log = log
        self._rich = open_terminal(sys.stderr)
        self._watcher = Watcher(paths)
        for role in ("trainer", "orchestrator", "evals"):
            self._watcher.take(role)  # what is there already was shown by an attempt before this one
        self._rewards: dict[int, float] = {}
        self._screen = Screen(self._watcher, self._rich) if self._rich.is_terminal else None
        self._drawn_at = self._checked_at = 0.0
        self._said: set[str] = set()
        self._outcome: Outcome | None = None

    def __enter__(self) -> "Console":
        if self._screen is not None:
            self._screen.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._screen is not None:
            self._screen.draw(self._outcome)
            self._screen.__exit__(kind, error, trace)
            self._screen = None

    def end(self, outcome: Outcome) -> None:
        """How the attempt ended: the last screen shows it."""
        self._outcome = outcome

    def say(self, text: str) -> None:
        """One message, to the person and to the launcher's log."""
        self._rich.print(text, markup=False, soft_wrap=True)
        self._log.write(text + "\n")
        self._log.flush()

    def refresh(self) -> None:
        """Show what the programs have recorded since the last call."""
        for row in self._watcher.take("orchestrator"):
            self._rewards[row["step"]] = row.get("reward/mean", float("nan"))
        for row in self._watcher.take("trainer"):
            self._show_step(row)
        for row in self._watcher.take("evals"):
            self.say(f"eval of policy {row['step']}: {_pairs(row, 'eval/')}")
        now = time.monotonic()
        if self._screen is not None and now - self._drawn_at > DRAW_S:
            self._screen.draw()
            self._drawn_at = now
        if now - self._checked_at > CHECK_S:
            self._check()
            self._checked_at = now

    def _check(self) -> None:
        """Say each warning once: those of this attempt's steps, and a stall once for as long as it lasts."""
        try:
            view = self._watcher.look()
        except Damaged:
            return  # the record is between two states; the launcher itself would say so
        if view is None:
            return
        for warning in view.warnings:
            if warning.step > self._begins_at and warning.key not in self._said:
                self._said.add(warning.key)
                self.say(f"Warning: {warning}")
        if view.stall is None:
            self._said.discard("stall")
        elif "stall" not in self._said:
            self._said.add("stall")
            self.say(f"Warning: {view.stall}")

    def _show_step(self, row: Row) -> None:
        step = row["step"]
        note = f"loss {row['loss']:.4f}"
        if step in self._rewards:
            note = f"reward {self._rewards[step]:.3f}  {note}"
        note += f"  lr {row['lr']:.2e}  {row.get('perf/tokens_per_s', 0):,.0f} tok/s"
        line = f"step {step}/{self._max_steps}  {note}"
        if self._rich.is_terminal:
            self._log.write(line + "\n")
        else:
            self.say(line)

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
        if self._paths.report.exists():
            lines.append(f"report: {self._paths.report}")
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
