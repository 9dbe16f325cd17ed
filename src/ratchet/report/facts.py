"""The data of a report: one run as plain values, small enough to travel inside a page."""

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ratchet import attempts, config_io, timeline
from ratchet.attempts import Record
from ratchet.errors import RatchetError
from ratchet.inputs import history
from ratchet.ledger import Line
from ratchet.metrics import Row
from ratchet.paths import RunPaths
from ratchet.report import rollouts
from ratchet.report.status import status
from ratchet.report.view import View
from ratchet.timeline import Span

POINTS = 600
SPANS = 4000
LEDGER_LINES = 200
_LEDGER_BYTES = 1 << 19
PAUSE_S = 30.0


def run_facts(view: View, *, rollout_bytes: int) -> dict[str, Any]:
    """Everything that a page shows of one run."""
    paths = RunPaths(view.root)
    return {
        "status": status(view),
        "written": time.time(),
        "series": series({"": view.trainer, "orchestrator/": view.orchestrator, "eval/": view.evals}),
        "marks": marks(paths),
        "timeline": timeline_facts(paths),
        "ledger": ledger_facts(paths),
        "config": dict(config_io.leaves(view.settings)) | input_facts(paths),
        "attempts": attempt_facts(paths, view.record),
        "rollouts": rollouts.sample(paths, view.settings, limit_bytes=rollout_bytes),
    }


def input_facts(paths: RunPaths) -> dict[str, str]:
    """What the run reads, beside its settings: two runs differ in either."""
    try:
        found = history.newest(paths)
    except RatchetError:
        return {}
    return {} if found is None else {f"inputs/{name}": value for name, value in history.leaves(found).items()}


def series(sources: dict[str, Sequence[Row]]) -> dict[str, dict[str, list[float]]]:
    """Each quantity as steps and values. Names that two programs share get a prefix for the second."""
    found: dict[str, dict[str, list[float]]] = {}
    for prefix, rows in sources.items():
        names = dict.fromkeys(name for row in rows for name in row)
        for name in names:
            if name in ("step", "time/at_s"):
                continue
            points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
            if points:
                found[name if name not in found else prefix + name] = _thinned(points)
    return found


def _thinned(points: list[tuple[int, float]]) -> dict[str, list[float]]:
    """At most POINTS of them: means of equal stretches, so that no spike becomes a trend; the last step stays."""
    if len(points) > POINTS:
        edges = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
        parts = [points[a:b] for a, b in itertools.pairwise(edges)]
        points = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    return {"x": [step for step, _ in points], "y": [_short(value) for _, value in points]}


def _short(value: float) -> float:
    """Five significant digits; JSON has no NaN, so that a hole stays a hole."""
    return float(f"{value:.5g}") if value == value else None  # pyright: ignore[reportReturnType]


def marks(paths: RunPaths) -> list[dict[str, Any]]:
    """Where an attempt or a restarted trainer took up the curve, as steps."""
    found = []
    for number in attempts.numbers(paths):
        try:
            record = attempts.read(paths, number)
        except RatchetError:
            continue
        if number > 1:
            word = "went back" if record.plan.rollback else "resumed"
            found.append({"step": record.plan.step, "attempt": number, "text": f"attempt {number} {word}"})
        accepted = () if record.inputs is msgspec.UNSET else record.inputs.accepted
        for entry in accepted:
            mark = {"step": entry.step, "attempt": number, "text": f"accepted: {entry}"}
            if mark["text"] not in [other["text"] for other in found]:
                found.append(mark)
        for restart in record.restarts:
            if restart.plan is not None:
                text = f"trainer restarted ({restart.reason})"
                found.append({"step": restart.plan.step, "attempt": number, "text": text})
    return found


def timeline_facts(paths: RunPaths) -> dict[str, Any]:
    """The newest phases of all programs, on a clock from which the pauses between attempts are cut out."""
    every: list[tuple[str, Span]] = []
    for role in timeline.roles(paths):
        every += [(role, span) for span in timeline.read(paths.timeline(role))]
    every.sort(key=lambda pair: pair[1].start)
    shown = every[-SPANS:]
    stretches = busy_stretches((span.start, span.end) for _, span in shown)
    lanes = []
    for role, span in shown:
        start = compressed(stretches, span.start)
        end = compressed(stretches, span.end)
        lane = _LANES.get((role, span.phase), role)
        lanes.append([lane, span.phase, span.step, round(start, 3), round(end, 3), span.attempt])
    return {
        "spans": lanes,
        "omitted": len(every) - len(shown),
        "stretches": [[round(compressed(stretches, a), 3), a, b] for a, b in stretches],
    }


_LANES = {
    ("orchestrator", "generate"): "generation",
    ("orchestrator", "eval"): "evaluation",
    ("trainer", "publish"): "policies",
    ("trainer", "copy"): "checkpoint",
    ("trainer", "save"): "checkpoint",
}


def busy_stretches(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of the spans, where pauses of less than PAUSE_S do not count."""
    found: list[list[float]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] < PAUSE_S:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return [(a, b) for a, b in found]


def compressed(stretches: list[tuple[float, float]], moment: float) -> float:
    """Seconds since the first stretch began, without the pauses between stretches."""
    passed = 0.0
    for start, end in stretches:
        if moment <= end:
            return passed + max(0.0, moment - start)
        passed += end - start
    return passed


def ledger_facts(paths: RunPaths) -> list[dict[str, Any]]:
    """The newest lines of the ledger; `ckpt audit` is what proves them."""
    if not paths.ledger.exists():
        return []
    found = []
    for line in _last_lines(paths.ledger):
        try:
            entry = msgspec.json.decode(line, type=Line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        found.append(
            {
                "step": entry.step,
                "groups": len(entry.trained),
                "samples": entry.samples,
                "draws": [group.draw for group in entry.trained],
                "dropped": [[draw, reason] for draw, reason in entry.dropped],
                "tokens": entry.tokens,
                "hash": entry.hash,
            }
        )
    return found[-LEDGER_LINES:]


def _last_lines(path: Path) -> list[bytes]:
    """The whole lines at the end, without reading the rest of a ledger that may be long."""
    with path.open("rb") as file:
        length = path.stat().st_size
        file.seek(max(0, length - _LEDGER_BYTES))
        data = file.read()
    lines = data.splitlines()
    return lines[1:] if length > _LEDGER_BYTES else lines


def attempt_facts(paths: RunPaths, newest: Record) -> list[dict[str, Any]]:
    """Every attempt: what was typed, where it began, how it ended. The newest may be about to be closed."""
    found = []
    for number in attempts.numbers(paths):
        try:
            record = newest if number == newest.attempt else attempts.read(paths, number)
        except RatchetError as error:
            found.append({"attempt": number, "problem": str(error)})
            continue
        plan, outcome = record.plan, record.outcome
        found.append(
            {
                "attempt": number,
                "command": " ".join(record.argv),
                "step": plan.step,
                "from_checkpoint": plan.from_checkpoint,
                "replayed": plan.next_batch - plan.step,
                "rollback": plan.rollback,
                "lineage": record.lineage,
                "outcome": outcome.reason if outcome else "open",
                "code": outcome.code if outcome else None,
                "announced": list(record.announced),
                "restarts": [f"{r.role}: {r.reason}" for r in record.restarts],
                "forked_from": msgspec.to_builtins(record.forked_from)
                if record.forked_from is not msgspec.UNSET
                else None,
                "environment": record.environment,
            }
        )
    return found
