"""`ckpt audit`, `diff`, `plan`: what can be proved, what differs, what would happen."""

import argparse
from pathlib import Path
from typing import Any

from ratchet import attempts, audit, compare, durable
from ratchet.audit import Report
from ratchet.cli.ckpt.output import check_run, check_step, say
from ratchet.errors import EXIT_CRASH, EXIT_OK, Refusal
from ratchet.paths import RunPaths, step_name

EXIT_FOUND = EXIT_CRASH
_SHOWN_TENSORS = 20


def audits(arguments: argparse.Namespace) -> int:
    """Exit 1 if anything does not reconcile."""
    report = audit.audit(RunPaths(arguments.run))
    say(report, _report_lines(report), as_json=arguments.json)
    return EXIT_FOUND if report.findings else EXIT_OK


def _report_lines(report: Report) -> list[str]:
    """The verdict, what it rests on, and last what cannot be proved."""
    count = len(report.findings)
    lines = [f"{count} problem{'s' * (count > 1)}" if count else "clean"]
    lines += [f"PROBLEM {finding}" for finding in report.findings]
    lines += [str(report.rows)] if report.rows is not None else _draw_lines(report)
    if report.inputs:
        lines.append(f"inputs: {', '.join(f'{group} {value}' for group, value in report.inputs.items())}")
    lines += [f"accepted: {change}" for change in report.accepted]
    return [*lines, *(f"note: {note}" for note in report.notes)]


def _draw_lines(report: Report) -> list[str]:
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(report.dropped.items()))
    lines = [
        f"{report.draws} draws = {report.trained} trained + {sum(report.dropped.values())} dropped"
        f"{f' ({dropped})' if dropped else ''} + {report.in_flight} in flight; "
        f"{report.skipped} skipped, {report.duplicated} duplicated"
    ]
    for label, env in report.envs.items():
        lines.append(
            f"{label}: {env.drawn} drawn = {env.trained} trained + {env.dropped} dropped + {env.in_flight} in flight; "
            f"{env.tasks} different tasks, each at most {env.most} times"
        )
    if report.ledger_range is not None:
        first, last = report.ledger_range
        lines.append(f"ledger: accounts for batches {first} to {last}")
        there = report.batch_range
        what = f"batches {there[0]} to {there[1]} are still there" if there else "no batch is still there"
        lines.append(f"log: {what} and were compared; what is older rests on the ledger's chain alone")
    return lines


def diff(arguments: argparse.Namespace) -> int:
    """Exit 1 if anything but a free setting differs."""
    (a, at), (b, bt) = _parse(arguments.a), _parse(arguments.b)
    settings = compare.settings(a, b)
    inputs = compare.inputs(a, at, b, bt)
    counters = compare.counters(a.checkpoint(at), b.checkpoint(bt))
    if compare.has_equal_shards(a.checkpoint(at), b.checkpoint(bt)):
        tensors: list[Any] = []
    else:
        durable.verify(a.checkpoint(at))  # before anything parses it
        durable.verify(b.checkpoint(bt))
        from ratchet.models import tensors as loaded

        tensors = loaded.differences(a.checkpoint(at), b.checkpoint(bt))
    value = {"config": settings, "inputs": inputs, "counters": counters, "tensors": tensors}
    lines = [f"config {change}" for change in settings] + [f"input {change}" for change in inputs]
    lines += [f"counter {change}" for change in counters]
    lines += [f"tensor {tensor}" for tensor in tensors[:_SHOWN_TENSORS]]
    if len(tensors) > _SHOWN_TENSORS:
        lines.append(f"... and {len(tensors) - _SHOWN_TENSORS} more tensors (--json lists all)")
    found = [change for change in settings if change.mark != "free"] or inputs or counters or tensors
    say(value, lines or ["no difference"], as_json=arguments.json)
    return EXIT_FOUND if found else EXIT_OK


def _parse(text: str) -> tuple[RunPaths, int]:
    """RUN or RUN@STEP. Raises: Refusal if there is no such checkpoint."""
    root, at, last = text.rpartition("@")
    if not at or not last.isdigit():
        root, last = text, ""
    paths = check_run(Path(root))
    there = list(durable.committed(paths.checkpoints))
    if not last:
        if not there:
            raise Refusal(f"{paths.root} has no sound checkpoint.")
        return paths, there[-1]
    check_step(paths, int(last))
    return paths, int(last)


def plan(arguments: argparse.Namespace) -> int:
    """Say what `--ckpt.resume-step` and `--max-steps` would do to this run, without doing it."""
    paths = RunPaths(arguments.run)
    record = attempts.newest(paths)
    if record is None:
        raise Refusal(f"{paths.root} holds no run: there is nothing to continue.")
    if not record.applied:
        lines = [
            f"Attempt {record.attempt} was planned and not carried out; the next start does this first:",
            *record.plan.messages,
            *(f"moves {name} to superseded/{record.attempt:03d}/" for name in record.plan.supersede),
        ]
        say({"open_intent": record.plan}, lines, as_json=arguments.json)
        return EXIT_OK
    from ratchet.launch import opening

    config = attempts.read_config(paths, record)
    chosen, announced = opening.decide(
        record.kind, paths, _changed(config, arguments.max_steps, arguments.resume_step), record
    )
    cut = compare.cut_lines(paths, chosen)
    lines = [*chosen.messages, *(f"changes {change}" for change in announced)]
    if not chosen.complete:
        start = step_name(chosen.step) if chosen.from_checkpoint else "the initial weights"
        lines.append(f"restores {start}")
        if record.kind == "rl":
            replayed = chosen.next_batch - chosen.step
            lines.append(f"replays {replayed} batches, samples anew from batch {chosen.next_batch} on")
        lines += [f"moves {name} to superseded/" for name in chosen.supersede]
        lines += [f"cuts {count} lines of {name}" for name, count in cut.items() if count]
        lines += [] if chosen.supersede or any(cut.values()) else ["discards nothing"]
    say({"plan": chosen, "announced": announced, "cut": cut}, lines, as_json=arguments.json)
    return EXIT_OK


def _changed(config: Any, max_steps: int | None, resume_step: int | None) -> Any:
    """The last attempt's configuration with what the command line says."""
    changed: dict[str, Any] = {}
    if max_steps is not None:
        changed["max_steps"] = max_steps
    if resume_step is not None or changed:
        wanted = -1 if resume_step is None else resume_step
        from ratchet.config import CkptConfig

        changed["ckpt"] = (config.ckpt or CkptConfig()).model_copy(update={"resume_step": wanted})
    return config.model_copy(update=changed)
