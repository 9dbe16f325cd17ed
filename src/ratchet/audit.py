"""What became of every draw, from the run directory alone: trained once, dropped once with a reason, or in flight.

An SFT run has rows of data instead: `audit_rows`.

    ledger      one line a batch, chained            what was trained and dropped, for ever
    batches     those that are still there           the lines, made again and compared
    state       of the newest batch or checkpoint    what is in flight, and how many draws there were
    rows        trainer and orchestrator             totals, against the sums of the lines

Nothing is written. What cannot be proved from what is there is said in `notes`, not passed over.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet import attempts, audit_rows, checkpoint, durable, ledger, metrics
from ratchet.audit_rows import PROGRESS, RowsReport
from ratchet.errors import EXIT_OK, Damaged, Refusal
from ratchet.inputs import history
from ratchet.ledger import Line, State
from ratchet.paths import RunPaths, step_name
from ratchet.records import Progress

_TOTALS = ("samples", "tokens", "problems")


class Finding(msgspec.Struct, frozen=True):
    """Something that does not reconcile; any of them makes the audit fail."""

    what: str
    detail: str
    draws: list[int] = []
    tasks: list[str] = []

    def __str__(self) -> str:
        draws = f" Draws: {', '.join(map(str, self.draws))}." if self.draws else ""
        tasks = f" Tasks: {', '.join(self.tasks)}." if self.tasks else ""
        return f"{self.what}: {self.detail}{draws}{tasks}"


class EnvReport(msgspec.Struct, frozen=True):
    """One environment's draws. `dropped` is the difference: a drop is recorded by draw and reason alone."""

    drawn: int
    trained: int
    in_flight: int
    dropped: int
    tasks: int
    """Different tasks that were trained."""
    most: int
    """How often the task that was trained most was trained: 1 where no epoch was completed twice."""


class Report(msgspec.Struct, kw_only=True):
    """The result of an audit."""

    run: str
    findings: list[Finding] = []
    notes: list[str] = []
    draws: int = 0
    trained: int = 0
    dropped: dict[str, int] = {}
    in_flight: int = 0
    skipped: int = 0
    duplicated: int = 0
    envs: dict[str, EnvReport] = {}
    ledger_range: tuple[int, int] | None = None
    """The batches that the ledger accounts for, both included."""
    batch_range: tuple[int, int] | None = None
    """Of these, the ones that are still there and were compared."""
    inputs: dict[str, str] = {}
    """What the run reads, by group: the attempts' records agree with every line of the ledger."""
    accepted: list[str] = []
    """Changes of an input that the user accepted, in order."""
    rows: RowsReport | None = None
    """Of an SFT run: it draws nothing."""


def audit(paths: RunPaths) -> Report:
    """Reconcile a run. It may be running: what is published while it is read is a later audit's.

    Raises: Refusal inside a start that was not carried out: then names and lines may not fit yet.
    """
    report = Report(run=str(paths.root))
    record = attempts.newest(paths)
    if record is not None and not record.applied:
        raise Refusal(
            f"Attempt {record.attempt} of {paths.root} was planned and is not carried out yet: run its command "
            "again, which finishes it first."
        )
    _show_inputs(paths, report)
    if record is not None and record.kind == "sft":
        report.rows, problems, notes = audit_rows.reconcile(paths)
        report.notes += notes
        report.findings = [Finding(what, detail) for what, detail in problems]
        return report
    report.notes += _restorations(paths)
    is_complete = record is not None and record.outcome is not None and record.outcome.code == EXIT_OK
    # Listed before the ledger is read, so that each of them has its line in it.
    batches, checkpoints = durable.steps(paths.batches), list(durable.committed(paths.checkpoints))
    lines = _read_ledger(paths, report)
    _compare_batches(paths, batches, lines, report, is_complete=is_complete)
    ordered = [lines[step] for step in sorted(lines)]
    for step, sentence in history.problems(paths, [(line.step, line.inputs) for line in ordered]):
        draws = [group.draw for group in lines[step].trained]
        report.findings.append(Finding("inputs", sentence, draws))
    _check_steps(ordered, checkpoints, report)
    state = _newest_state(paths, ordered, report)
    _reconcile(ordered, state, report)
    if state is not None:
        _count_envs(ordered, state, report)
    _check_totals(paths, ordered, state, report, is_complete=is_complete)
    return report


def _show_inputs(paths: RunPaths, report: Report) -> None:
    found = history.newest(paths)
    if found is None:
        report.notes.append("this run has no names of its inputs: that they stayed the same is not proved")
        return
    report.inputs = history.said(found)
    report.accepted = [str(entry) for entry in found.accepted]


def _restorations(paths: RunPaths) -> list[str]:
    """What a disk took with it that is gone: of that only what was mirrored can be proved."""
    found = [attempts.read(paths, number).restored for number in attempts.numbers(paths)]
    return [
        f"restored at step {r.step} from {r.mirror}: the proof from batches begins at batch {r.step}; those before it "
        "were not mirrored, their lines rest on the ledger's chain alone; what the disk that is gone held after step "
        f"{r.step} was another future and is not accounted for"
        for r in found
        if r is not msgspec.UNSET
    ]


def _read_ledger(paths: RunPaths, report: Report) -> dict[int, Line]:
    """The lines by batch; whatever is wrong with one is a finding, and it is used all the same if it parses."""
    lines: dict[int, Line] = {}
    for entry, problem in ledger.checked(paths.ledger):
        if problem:
            report.findings.append(Finding("ledger", f"{problem}: it was edited, or one before it is gone."))
        if entry is None:
            continue
        if entry.step in lines:
            report.findings.append(
                Finding("ledger", f"batch {entry.step} has two lines.", [g.draw for g in entry.trained])
            )
        lines[entry.step] = entry
    if lines:
        report.ledger_range = min(lines), max(lines)
    if bare := [step for step, entry in lines.items() if not entry.payload]:
        report.notes.append(
            f"the lines of batches {min(bare)} to {max(bare)} are of an older version, without the digest of what was "
            "sampled: that is not proved"
        )
    return lines


def _compare_batches(
    paths: RunPaths, there: list[int], lines: dict[int, Line], report: Report, *, is_complete: bool
) -> None:
    """Make the line of each batch that is there again; a line that is missing is taken from its batch."""
    compared = []
    for step in there:
        try:
            made = ledger.line_of(paths, step)
        except (Damaged, FileNotFoundError) as error:
            if paths.batch(step).exists():  # otherwise retention deleted it meanwhile
                report.findings.append(Finding("batch", str(error)))
            continue
        compared.append(step)
        stated = lines.get(step)
        if stated is None:
            lines[step] = made
            if step == there[-1] and not is_complete:
                report.notes.append(f"batch {step} has no line yet: the next start appends it")
            else:
                draws = [group.draw for group in made.trained]
                report.findings.append(Finding("ledger", f"batch {step} has no line.", draws))
        elif not ledger.agrees(stated, made):
            report.findings.append(_difference(step, stated, made))
    if compared:
        report.batch_range = compared[0], compared[-1]
    newest, end = max(lines, default=-1), max(durable.steps(paths.batches), default=None)
    if end is not None and newest > end:
        report.findings.append(Finding("ledger", f"it goes on to batch {newest}, the log ends at {end}."))


def _difference(step: int, stated: Line, made: Line) -> Finding:
    trained = {*stated.trained} ^ {*made.trained}
    dropped = {*stated.dropped} ^ {*made.dropped}
    has_same_draws = not trained and not dropped and stated.tokens == made.tokens
    what = ": another token, logprob or reward, or another state after it" if has_same_draws else ""
    return Finding(
        "ledger",
        f"the line of batch {step} is not what the batch holds{what}.",
        sorted({group.draw for group in trained} | {draw for draw, _ in dropped}),
        sorted({f"{group.env}/{group.task}" for group in trained}),
    )


def _check_steps(lines: list[Line], checkpoints: list[int], report: Report) -> None:
    known = {line.step for line in lines}
    first, last = min(known, default=0), max(known, default=-1)
    end = max(last, *(step - 1 for step in checkpoints), -1)
    gone = sorted(set(range(first, end + 1)) - known)
    if gone:
        report.findings.append(
            Finding("ledger", f"nothing accounts for batches {', '.join(map(str, gone))}.")
        )
    if first > 0:
        report.notes.append(f"nothing accounts for batches 0 to {first - 1}: they are not proved")


def _newest_state(paths: RunPaths, lines: list[Line], report: Report) -> State | None:
    """The orchestrator's state after the newest batch: in that batch, or in the checkpoint that follows it."""
    end = lines[-1].step + 1 if lines else 0
    directory, part = paths.batch(end - 1), "orchestrator.json"
    if not directory.exists():
        directory, part = paths.checkpoint(end), checkpoint.STATE
    if end == 0 or not directory.exists():
        if end:
            report.notes.append(f"no state after batch {end - 1} is there: what was in flight is not known")
        return None
    try:
        durable.verify(directory)
        return ledger.read_state((directory / part).read_bytes())
    except Damaged as error:
        report.findings.append(Finding("state", str(error)))
        return None


def _reconcile(lines: list[Line], state: State | None, report: Report) -> None:
    """Give every draw the places where it ended: exactly one."""
    ended: dict[int, list[str]] = defaultdict(list)
    tasks: dict[int, str] = {}
    for line in lines:
        for group in line.trained:
            ended[group.draw].append(f"trained in batch {line.step}")
            tasks[group.draw] = f"{group.env}/{group.task}"
        for draw, reason in line.dropped:
            ended[draw].append(f"dropped before batch {line.step} ({reason})")
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
        report.trained += len(line.trained)
    for draw in _in_flight(state):
        ended[draw].append("in flight")
        report.in_flight += 1
    for draw, reason in state.drops_since if state else []:
        ended[draw].append(f"dropped since ({reason})")
        report.dropped[reason] = report.dropped.get(reason, 0) + 1
    _check_dropped(lines, state, report)
    report.draws = state.next_draw if state else max((line.next_draw for line in lines), default=0)
    _find_skipped(lines, ended, report, is_known=state is not None)
    doubled = sorted(draw for draw, places in ended.items() if len(places) > 1)
    report.duplicated = len(doubled)
    for draw in doubled:
        task = [tasks[draw]] if draw in tasks else []
        report.findings.append(Finding("duplicated", f"{', '.join(ended[draw])}.", [draw], task))
    unborn = sorted(draw for draw in ended if draw >= report.draws)
    if unborn:
        what = f"only {report.draws} draws were made."
        report.findings.append(Finding("draws", what, unborn, sorted(tasks[d] for d in unborn if d in tasks)))


def _in_flight(state: State | None) -> list[int]:
    if state is None:
        return []
    return [*(running.draw for running in state.running), *(group.draw for group in state.ready)]


def _find_skipped(lines: list[Line], ended: dict[int, list[str]], report: Report, *, is_known: bool) -> None:
    """Draws that ended nowhere. Where the ledger begins later, older draws may have ended before it."""
    first = lines[0].next_draw if lines and lines[0].step > 0 else 0
    missing = sorted(set(range(first, report.draws)) - set(ended))
    if not is_known:
        if missing:
            report.notes.append(f"{len(missing)} draws are not accounted for without a state: {missing}")
        return
    report.skipped = len(missing)
    if missing:
        what = "neither trained, nor dropped, nor in flight."
        report.findings.append(Finding("skipped", what, missing))


def _check_dropped(lines: list[Line], state: State | None, report: Report) -> None:
    """The state counts drops by reason over the whole run."""
    if state is None or (lines and lines[0].step > 0):
        return
    if {k: n for k, n in state.dropped.items() if n} != report.dropped:
        what = f"the state counts {state.dropped}, the ledger {report.dropped}."
        report.findings.append(Finding("dropped", what))


def _count_envs(lines: list[Line], state: State, report: Report) -> None:
    trained: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        for group in line.trained:
            trained[group.env][group.task] += 1
    flying: Counter[str] = Counter(running.env for running in state.running)
    flying.update(group.samples[0].env for group in state.ready)
    for env in state.envs:
        tasks = trained[env.label]
        dropped = env.drawn - tasks.total() - flying[env.label]
        report.envs[env.label] = EnvReport(
            env.drawn, tasks.total(), flying[env.label], dropped, len(tasks), max(tasks.values(), default=0)
        )
        if dropped < 0:
            what = f"{env.label} was drawn {env.drawn} times, {env.drawn - dropped} are accounted for."
            report.findings.append(Finding("environment", what))
    if lines and lines[0].step > 0:
        report.notes.append("per environment, what was trained before the ledger begins counts as dropped")
    elif sum(env.drawn for env in state.envs) != state.next_draw:
        what = f"{sum(env.drawn for env in state.envs)} draws of environments, {state.next_draw} in all."
        report.findings.append(Finding("environment", what))
    report.notes.append(
        "epochs: the size of an environment's data is not in the run directory; `most` says how often its most "
        "trained task was trained"
    )


def _check_totals(
    paths: RunPaths, lines: list[Line], state: State | None, report: Report, *, is_complete: bool
) -> None:
    """Totals are sums of lines; from a ledger that begins later only their growth is."""
    sums = dict(_sums(lines))
    if not sums:
        return
    is_whole = lines[0].step == 0
    if state is not None:
        _compare(sums, _of_progress(state.progress), "the state", is_whole, report)
    for role in ("orchestrator", "trainer"):
        rows = metrics.read(paths.metric(role))
        steps = [row["step"] for row in rows]
        if steps != list(range(1, len(steps) + 1)):
            report.findings.append(Finding("rows", f"{role}: the steps have a gap or a double row: {steps}."))
        if is_complete and steps and steps[-1] != lines[-1].step + 1:
            what = f"{role}: the rows end at step {steps[-1]}, the batches lead to {lines[-1].step + 1}."
            report.findings.append(Finding("rows", what))
        for row in rows:
            _compare(sums, _of_row(row), f"{role}'s row of step {row['step']}", is_whole, report)
    for step in durable.committed(paths.checkpoints):
        if (path := paths.checkpoint(step) / PROGRESS).exists():
            _check_progress(path, step, sums, is_whole, report)


def _check_progress(
    path: Path, step: int, sums: dict[int, dict[str, int]], is_whole: bool, report: Report
) -> None:
    try:
        progress = msgspec.json.decode(path.read_bytes(), type=Progress)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        report.findings.append(Finding("checkpoint", f"{path} does not parse ({error})."))
        return
    _compare(sums, _of_progress(progress), f"checkpoints/{step_name(step)}", is_whole, report)


def _of_progress(progress: Progress) -> dict[str, int]:
    return {"step": progress.step, **{name: getattr(progress, f"total_{name}") for name in _TOTALS}}


def _of_row(row: metrics.Row) -> dict[str, int]:
    stated = {name: row.get(f"progress/total_{name}") for name in _TOTALS}
    return {"step": row["step"], **{name: value for name, value in stated.items() if value is not None}}


def _sums(lines: Iterable[Line]) -> Iterable[tuple[int, dict[str, int]]]:
    """The totals after each step, as the ledger has them."""
    totals: dict[str, int] = dict.fromkeys(_TOTALS, 0)
    for line in lines:
        totals["samples"] += line.samples
        totals["tokens"] += line.tokens
        totals["problems"] += len(line.trained)
        yield line.step + 1, dict(totals)


def _compare(
    sums: dict[int, dict[str, int]], stated: dict[str, int], who: str, is_whole: bool, report: Report
) -> None:
    expected = sums.get(stated["step"])
    if expected is None or not is_whole:
        return
    for name, value in stated.items():
        if name != "step" and value != expected[name]:
            what = f"{who} states total_{name} {value}, the ledger adds up to {expected[name]}."
            report.findings.append(Finding("totals", what))
