"""One screen for one run: a `View` drawn with rich, for the launcher's console and for `ratchet watch` alike."""

import math
from collections.abc import Iterable, Sequence

from rich.align import Align
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ratchet.metrics import Row
from ratchet.report import waits
from ratchet.report.curve import sparkline
from ratchet.report.health import column
from ratchet.report.view import View

WIDE = 96
_LABEL, _VALUE, _GOOD, _BAD, _WARN = "bright_black", "bold", "green", "bold red", "yellow"


def screen(view: View, width: int) -> RenderableType:
    """Everything that somebody who looks in wants to know first; two columns where there is room."""
    is_wide = width >= WIDE
    room = (width // 2 - 6) if is_wide else width - 6
    left, right = [_learning(view, room), _speed(view, room)], [_programs(view), _checkpoints(view)]
    body: list[RenderableType] = [_progress(view)]
    body += [_beside(left, right)] if is_wide else [*left, *right]
    notes = _notes(view)
    if notes:
        body.append(Panel(Group(*notes), title="[bold]to look at", title_align="left", border_style=_WARN))
    return Group(*body)


def _beside(left: Sequence[RenderableType], right: Sequence[RenderableType]) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(Group(*left), Group(*right))
    return grid


def _panel(title: str, body: RenderableType) -> Panel:
    return Panel(body, title=f"[bold]{title}", title_align="left", border_style=_LABEL, padding=(0, 1))


def _table(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=_LABEL, no_wrap=True)
    table.add_column()
    for label, value in rows:
        table.add_row(label, value)
    return table


def _progress(view: View) -> RenderableType:
    """Name, state, a bar, and when it will be done."""
    head = Table.grid(expand=True)
    head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    head.add_column(justify="right", no_wrap=True)
    head.add_row(
        Text.assemble((f" {view.kind} ", "reverse"), " ", (str(view.root), _VALUE)),
        Text.assemble((f"attempt {view.record.attempt}  ", _LABEL), _state(view)),
    )
    line = Table.grid(expand=True, padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(
        total=view.max_steps, completed=view.step, complete_style="green", finished_style="green"
    )
    line.add_row(
        Text.assemble(("step ", _LABEL), (f"{view.step}", _VALUE), (f" / {view.max_steps}", _LABEL)),
        Align(bar, vertical="middle"),
        Text(_when(view), style=_LABEL),
    )
    return Panel(Group(head, line), border_style=_LABEL, padding=(0, 1))


def _state(view: View) -> Text:
    outcome = view.record.outcome
    if view.is_gone:
        return Text(f"● {view.state}", _BAD)
    if outcome is None:
        return Text("● running", _GOOD) if view.state == "running" else Text("● silent", _WARN)
    return Text(f"● {outcome.reason}", _GOOD if outcome.code == 0 else _WARN if outcome.code == 75 else _BAD)


def _when(view: View) -> str:
    pace = f"{seconds(view.step_s)} a step" if view.step_s else ""
    if view.eta_s is None:
        return pace
    return f"{pace}   {seconds(view.eta_s)} left" if view.step < view.max_steps else pace


def _learning(view: View, room: int) -> RenderableType:
    """Reward or loss with its curve, then the figures by which one sees that learning is sound."""
    rows: list[tuple[str, RenderableType]] = []
    width = max(8, room - 28)
    if view.kind == "rl":
        rows.append(("reward", _curve(view.orchestrator, "reward/mean", width, "green")))
        for name in _eval_names(view.evals):
            label = "eval" if len(_eval_names(view.evals)) == 1 else f"eval {name.split('/')[1]}"
            rows.append((label, _curve(view.evals, name, width, "cyan", has_step=True)))
    rows.append(("loss", _curve(view.trainer, "loss", width, "magenta")))
    if view.kind == "rl":
        rows.append(("KL", _curve(view.trainer, "policy/mismatch_kl", width, "yellow")))
        rows.append(("entropy", _curve(view.trainer, "policy/entropy", width, "blue")))
    rows.append(("grad norm", _curve(view.trainer, "grad_norm", width, "bright_black")))
    rate = view.last("lr")
    rows.append(("lr", Text(f"{rate:>8.2e}" if rate is not None else "-", _VALUE)))
    return _panel("learning", _table(rows))


def _eval_names(rows: list[Row]) -> list[str]:
    names = rows[-1] if rows else {}
    return [name for name in names if name.startswith("eval/") and name.endswith("/reward")]


def _curve(rows: list[Row], name: str, width: int, style: str, *, has_step: bool = False) -> Text:
    values = column(rows, name)
    if not values:
        return Text("-", _LABEL)
    drawn = sparkline([value for _, value in values], width)
    text = Text.assemble((f"{figure(values[-1][1]):>8} ", _VALUE), (drawn, style))
    if has_step:
        text.append(f" policy {values[-1][0]}", _LABEL)
    return text


def _programs(view: View) -> RenderableType:
    """Which policy each program is at, what is in flight, and who waits for whom."""
    rows: list[tuple[str, RenderableType]] = []
    policies = Text()
    for name, step in view.policies.items():
        policies.append(f"{name} ", _LABEL)
        policies.append(f"{step if step >= 0 else '-'}  ", _VALUE)
    rows.append(("policy", policies))
    if view.kind == "rl":
        age = view.last("policy/off_policy_steps")
        rows.append(("staleness", Text(f"{age:.2f} steps" if age is not None else "-", _VALUE)))
        rows += _rollouts(view)
    if view.is_open:
        found = waits.waits(view.facts)
        for index, wait in enumerate(found):
            text = Text.assemble((f"{wait.who} → {wait.on}  ", ""), (wait.why, _LABEL))
            rows.append(("waits" if index == 0 else "", text))
        if not found:
            rows.append(("waits", Text("nobody", _GOOD)))
    restarts = ", ".join(f"{role} {count}" for role, count in view.restarts.items())
    rows.append(("restarts", Text(restarts, _WARN) if restarts else Text("none", _GOOD)))
    return _panel("programs", _table(rows))


def _rollouts(view: View) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = []
    if view.now is not None:
        state = view.now
        text = Text.assemble(
            (f"{state.rollouts_running}", _VALUE),
            (" in flight  ", _LABEL),
            (f"{state.groups_ready}/{state.groups_wanted}", _VALUE),
            (f" groups of batch {state.batch}", _LABEL),
        )
        rows.append(("rollouts", text))
    trained = view.last("progress/total_samples")
    rows.append(("trained", Text(f"{trained or 0:,} rollouts", _VALUE)))
    lost = ", ".join(f"{reason} {count:,}" for reason, count in view.dropped.items())
    rows.append(("dropped", Text(lost, _WARN) if lost else Text("none", _GOOD)))
    return rows


def _speed(view: View, room: int) -> RenderableType:
    rows: list[tuple[str, RenderableType]] = []
    width = max(8, room - 30)
    if view.kind == "rl":
        rows.append(("generation", _rate(view.orchestrator, width, "cyan")))
    rows.append(("training", _rate(view.trainer, width, "green")))
    if view.trainer:
        last = view.trainer[-1]
        parts = [
            f"waited {seconds(last.get('time/wait_s', 0))}",
            f"trained {seconds(last.get('time/train_s', 0))}",
        ]
        rows.append(("last step", Text("  ".join(parts), _LABEL)))
        total = last.get("progress/total_tokens", 0)
        rows.append(("tokens", Text(f"{total:,}", _VALUE)))
    return _panel("speed", _table(rows))


def _rate(rows: list[Row], width: int, style: str) -> Text:
    values = column(rows, "perf/tokens_per_s")
    if not values:
        return Text("-", _LABEL)
    drawn = sparkline([value for _, value in values], width)
    return Text.assemble((f"{values[-1][1]:>9,.0f} ", _VALUE), ("tok/s ", _LABEL), (drawn, style))


def _checkpoints(view: View) -> RenderableType:
    rows: list[tuple[str, RenderableType]] = []
    if view.facts.saving is not None and view.is_open:
        rows.append(("writing", Text(f"step {view.facts.saving}", "cyan")))
    if not view.checkpoints:
        is_asked = "ckpt" in view.settings
        text = "none yet" if is_asked else "none: this run was started without --ckpt"
        rows.append(("newest", Text(text, _LABEL if is_asked else _WARN)))
        return _panel("checkpoints", _table(rows))
    newest = view.checkpoints[-1]
    sound = ("sound", _GOOD) if newest.is_sound else ("DAMAGED", _BAD)
    text = Text.assemble(("step ", _LABEL), (f"{newest.step}", _VALUE), "  ", sound)
    rows.append(("newest", text))
    if newest.is_sound:
        rows.append(("age, size", Text(f"{seconds(newest.age_s)}, {size(newest.size_bytes)}", _VALUE)))
    bad = [str(saved.step) for saved in view.checkpoints if not saved.is_sound]
    others = f"{len(view.checkpoints)}" + (f", damaged: {', '.join(bad)}" if bad else ", all sound")
    rows.append(("kept", Text(others, _BAD if bad else _LABEL)))
    return _panel("checkpoints", _table(rows))


def _notes(view: View) -> list[RenderableType]:
    """The stall, if there is one, then the warnings."""
    found = [Text(view.stall, _BAD)] if view.stall else []
    for warning in view.warnings:
        head = (f"step {warning.step}  ", _WARN)
        found.append(Text.assemble(head, (warning.text, ""), ". ", (warning.remedy, _LABEL)))
    return list(found)


def seconds(value: float) -> str:
    """A duration as a person says it."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 172800 else f"{value / 86400:.1f} d"


def size(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def figure(value: float) -> str:
    """Four significant digits, without noise for very small values."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
