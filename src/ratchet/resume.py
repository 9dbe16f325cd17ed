"""Where a run continues: decided by a pure function, carried out under the run's lock.

    survey   what is on the disk          ─► Listing
    plan     Listing + Request            ─► Plan, or a Refusal; no I/O
    apply    Plan                         ─► published names moved aside, metric rows rewound

The plan is committed in the attempt's record before it is applied, and every part of `apply` may be
repeated: a launcher that dies inside leaves an intent that the next start finishes.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet import batchlog, durable, journal, ledger, metrics
from ratchet.attempts import Plan
from ratchet.errors import Damaged, Refusal
from ratchet.paths import RunPaths, step_name
from ratchet.stage import Stage

_SHOWN = 6
"""Settings that are named where a command is another one."""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The published steps of a run directory; `damaged` maps those that failed a check to the sentence."""

    checkpoints: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    evals: tuple[int, ...] = ()
    damaged_checkpoints: dict[int, str] = {}
    damaged_batches: dict[int, str] = {}
    journal: tuple[str, ...] = ()
    """The journal's segments, by file name."""
    damaged_journal: dict[str, str] = {}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the command asks for, next to what the last attempt left."""

    kind: str
    max_steps: int
    resume_step: int | None = None
    """None: not stated; -1: the newest."""
    has_run: bool = False
    """An attempt was begun in this directory."""
    is_same: bool = False
    """This command is the one of the last attempt, whose own request was carried out."""
    differences: tuple[str, ...] = ()
    """The settings in which it is not, with both values."""
    was_finished: bool = False
    """The last attempt ended with exit 0."""
    on_corrupt: str = "stop"


def survey(paths: RunPaths) -> Listing:
    """List what is published, by the cheap check; `plan`'s choice is verified byte by byte afterwards."""
    checkpoints, damaged_checkpoints = _sound(paths.checkpoints)
    batches, damaged_batches = _sound(paths.batches)
    return Listing(
        checkpoints=checkpoints,
        batches=batches,
        weights=tuple(durable.steps(paths.weights)),
        evals=tuple(durable.steps(paths.evals)),
        damaged_checkpoints=damaged_checkpoints,
        damaged_batches=damaged_batches,
        journal=tuple(path.name for path in journal.segments(paths)),
    )


def _sound(root: Path) -> tuple[tuple[int, ...], dict[int, str]]:
    sound, damaged = [], {}
    for step in durable.steps(root):
        directory = root / step_name(step)
        try:
            durable.check_sizes(directory, durable.read_manifest(directory))
            sound.append(step)
        except Damaged as error:
            damaged[step] = str(error)
    return tuple(sound), damaged


def plan(listing: Listing, request: Request) -> Plan:
    """Decide where to continue. Pure. Raises: Refusal with the remedy."""
    if not request.has_run:
        return _plan_fresh(request)
    if request.is_same and request.was_finished:
        return Plan(complete=True, step=request.max_steps, messages=("This run is complete.",))
    if request.resume_step is None and not request.is_same:
        raise _another_command(listing, request)
    asked = None if request.is_same else request.resume_step
    if asked is None or asked == -1:
        step = _newest(listing, request)
        return _plan_newest(listing, request, step)
    return _plan_step(listing, request, asked)


def _another_command(listing: Listing, request: Request) -> Refusal:
    """What differs, and the ways out; going on is none where there is nothing to go on from."""
    shown = "; ".join(request.differences[:_SHOWN]) + ("; ..." if len(request.differences) > _SHOWN else "")
    can_go_on = listing.checkpoints or (request.kind == "rl" and 0 in listing.batches)
    go_on = "go on with these from where it stands by --ckpt.resume-step -1, " if can_go_on else ""
    return Refusal(
        f"This directory holds a run that was started with other settings ({shown}): put them back, {go_on}or give the "
        "new run another --output-dir."
    )


def _plan_fresh(request: Request) -> Plan:
    if request.resume_step is None:
        return Plan()
    if request.resume_step == -1:
        return Plan(messages=("Nothing to resume here yet: this is a fresh run.",))
    raise Refusal(
        f"There is no checkpoint of step {request.resume_step}: this directory holds no run yet. "
        "Start without --ckpt.resume-step."
    )


def _newest(listing: Listing, request: Request) -> int:
    """The newest sound checkpoint; 0 where there is none. Raises: Refusal if a newer one is damaged."""
    sound = max(listing.checkpoints, default=0)
    newer = [step for step in listing.damaged_checkpoints if step > sound]
    if newer and request.on_corrupt == "stop":
        instead = f"the newest sound one is step {sound}" if sound else "no other checkpoint is sound"
        raise Refusal(
            f"{listing.damaged_checkpoints[max(newer)]} "
            f"Move it aside and continue from an older state with --ckpt.on-corrupt fallback; {instead}."
        )
    return sound


def _plan_newest(listing: Listing, request: Request, step: int) -> Plan:
    _check_max_steps(step, request)
    if step == request.max_steps and request.was_finished:
        message = f"Nothing to do: the run is complete at step {step}."
        return Plan(complete=True, step=step, messages=(message,))
    if step == 0:
        return _plan_from_start(listing, request)
    return _continue(listing, request, step, f"Continuing at step {step}, from {step_name(step)}")


def _plan_from_start(listing: Listing, request: Request) -> Plan:
    """No checkpoint: the initial weights are one, as long as every batch since step 0 is there."""
    last = max(listing.weights, default=0)
    if request.kind == "sft" and (request.is_same or request.resume_step == 0 or not last):
        return _sft_again(listing, request, last)
    if request.kind == "sft":
        raise Refusal(
            "No checkpoint was made, so nothing can be continued: begin a new run from the last policy (model.name = "
            f"its weights/{step_name(last)}, another --output-dir), or start over with --ckpt.resume-step 0, which "
            "moves what is there to superseded/."
        )
    if 0 in listing.batches or not (listing.batches or any(step > 0 for step in listing.weights)):
        return _continue(listing, request, 0, "No checkpoint yet: continuing from the initial weights")
    gone = "There is no sound checkpoint and the first batches are gone, so nothing can be continued"
    if not request.is_same and request.resume_step != 0:
        raise Refusal(
            f"{gone}: start over with --ckpt.resume-step 0, or begin a new run from the last policy "
            "(model.name = its weights/step_N, another --output-dir)."
        )
    message = f"{gone}: starting again at step 0; what was there is moved to superseded/."
    return Plan(rollback=True, supersede=_past(listing, 0), messages=(message,))


def _sft_again(listing: Listing, request: Request, last: int) -> Plan:
    """From step 0, where nothing was saved: the same command makes the same again, another one moves it aside."""
    message = "Nothing was saved yet: starting at step 0"
    if request.is_same:
        return _continue(listing, request, 0, message)
    what = f"weights/{step_name(last)} and the rows" if last else "the rows"
    said = f"{message}; {what} of the training before are moved to superseded/."
    return Plan(rollback=True, supersede=_past(listing, 0), messages=(said,))


def _plan_step(listing: Listing, request: Request, step: int) -> Plan:
    if step in listing.damaged_checkpoints:
        raise Refusal(
            f"{listing.damaged_checkpoints[step]} Sound checkpoints: {_names(listing.checkpoints)}."
        )
    if step > 0 and step not in listing.checkpoints:
        raise Refusal(f"There is no checkpoint of step {step}; there are: {_names(listing.checkpoints)}.")
    _check_max_steps(step, request)
    if step == max(listing.checkpoints, default=0):
        if step == 0:
            return _plan_from_start(listing, request)
        if step == request.max_steps and request.was_finished:
            message = f"Nothing to do: the run is complete at step {step}."
            return Plan(complete=True, step=step, messages=(message,))
        return _continue(listing, request, step, f"Resuming at step {step}")
    moved = _past(listing, step)
    message = f"Rolling back to step {step}: what came after it is moved to superseded/."
    return Plan(
        step=step,
        from_checkpoint=step > 0,
        next_batch=step,
        rollback=True,
        supersede=moved,
        messages=(message,),
    )


def _check_max_steps(step: int, request: Request) -> None:
    if step > request.max_steps:
        raise Refusal(
            f"max_steps is {request.max_steps}, but the run stands at step {step}: raise --max-steps, "
            "or roll back with --ckpt.resume-step."
        )


def _continue(listing: Listing, request: Request, step: int, message: str) -> Plan:
    """Restore `step` and replay the contiguous, sound part of the log behind it."""
    end = step
    while end in listing.batches:
        end += 1
    messages = [f"{message}, replaying batches {step} to {end - 1}." if end > step else f"{message}."]
    aside = [f"checkpoints/{step_name(s)}" for s in sorted(listing.damaged_checkpoints)]
    messages += [
        f"{listing.damaged_checkpoints[s]} It is moved aside." for s in sorted(listing.damaged_checkpoints)
    ]
    beyond = sorted(s for s in {*listing.batches, *listing.damaged_batches} if s >= end)
    if beyond:
        why = listing.damaged_batches.get(end, f"Batch {end} is missing from the log.")
        messages.append(f"{why} The batches from {end} on are moved aside and generated again.")
    aside += [f"batches/{step_name(s)}" for s in beyond]
    if beyond:
        # What was made from those batches belongs to another future: its policies and evaluations do not count.
        aside += [f"weights/{step_name(s)}" for s in listing.weights if s > end]
        aside += [f"evals/{step_name(s)}" for s in listing.evals if s > end]
    # Where the log is cut, rollouts may be by policies that are made anew.
    aside += [f"journal/{n}" for n in (listing.journal if beyond else sorted(listing.damaged_journal))]
    messages += _about_journal(listing, request, is_cut=bool(beyond))
    return Plan(
        step=step,
        from_checkpoint=step > 0,
        next_batch=end if request.kind == "rl" else step,
        cuts_log=bool(beyond),
        supersede=tuple(aside),
        messages=tuple(messages),
    )


def _about_journal(listing: Listing, request: Request, *, is_cut: bool) -> list[str]:
    """What is said about damaged segments. Raises: Refusal, unless they are moved aside."""
    if is_cut:
        return []
    sentences = [listing.damaged_journal[name] for name in sorted(listing.damaged_journal)]
    if sentences and request.on_corrupt == "stop":
        raise Refusal(
            f"{sentences[0]} Move the file away, or have it moved aside with --ckpt.on-corrupt fallback; "
            "the rollouts in it are then sampled again."
        )
    return [f"{sentence} It is moved aside: its rollouts are sampled again." for sentence in sentences]


def _past(listing: Listing, step: int) -> tuple[str, ...]:
    """Everything that a rollback to `step` moves aside, newest first."""
    found = [
        *(("batches", s) for s in {*listing.batches, *listing.damaged_batches} if s >= step),
        *(("checkpoints", s) for s in {*listing.checkpoints, *listing.damaged_checkpoints} if s > step),
        *(("weights", s) for s in listing.weights if s > step),
        *(("evals", s) for s in listing.evals if s > step),
    ]
    steps = sorted(found, key=lambda item: (-item[1], item[0]))
    return (
        *(f"journal/{name}" for name in listing.journal),
        *(f"{root}/{step_name(s)}" for root, s in steps),
    )


def _names(steps: Iterable[int]) -> str:
    return ", ".join(str(step) for step in steps) or "none"


def verify(paths: RunPaths, chosen: Plan, listing: Listing) -> Listing:
    """Read every byte that a plan relies on; what fails becomes damage in the listing that is returned."""
    listing = _verify_replay(paths, chosen, listing)
    return msgspec.structs.replace(
        listing, damaged_journal=journal.damaged(paths) if not chosen.rollback else {}
    )


def _verify_replay(paths: RunPaths, chosen: Plan, listing: Listing) -> Listing:
    """What the trainer will read: its checkpoint, and the batches behind it."""
    bad_checkpoints, bad_batches = dict(listing.damaged_checkpoints), dict(listing.damaged_batches)
    if chosen.from_checkpoint:
        _verify_one(paths.checkpoint(chosen.step), chosen.step, bad_checkpoints)
    for step in range(chosen.step, chosen.next_batch):
        _verify_one(paths.batch(step), step, bad_batches)
    return msgspec.structs.replace(
        listing,
        checkpoints=tuple(s for s in listing.checkpoints if s not in bad_checkpoints),
        batches=tuple(s for s in listing.batches if s not in bad_batches),
        damaged_checkpoints=bad_checkpoints,
        damaged_batches=bad_batches,
    )


def _verify_one(directory: Path, step: int, damaged: dict[int, str]) -> None:
    try:
        durable.verify(directory)
    except Damaged as error:
        damaged[step] = str(error)


def decide(paths: RunPaths, request: Request) -> Plan:
    """Plan, verify the choice, and plan again with the verdict until it holds. Raises: Refusal."""
    listing = survey(paths)
    while True:
        chosen = plan(listing, request)
        if chosen.complete:
            return chosen
        checked = verify(paths, chosen, listing)
        if checked == listing:
            return chosen
        listing = checked


def plan_trainer(listing: Listing, kind: str) -> Plan:
    """Where the trainer of an open attempt continues while the other programs go on: nothing is moved aside. Pure.

    Raises: Refusal if only a new attempt, which may move things aside, can continue.
    """
    step = max(listing.checkpoints, default=0)
    newer = [s for s in listing.damaged_checkpoints if s > step]
    if newer:
        raise Refusal(listing.damaged_checkpoints[max(newer)])
    if kind == "sft":
        return Plan(step=step, from_checkpoint=step > 0, next_batch=step)
    end = max(step, 1 + max((*listing.batches, *listing.damaged_batches), default=-1))
    if step == 0 and 0 not in listing.batches and (end > 0 or any(s > 0 for s in listing.weights)):
        raise Refusal("No checkpoint was made and the first batches are gone.")
    for batch in range(step, end):
        if batch not in listing.batches:
            raise Refusal(listing.damaged_batches.get(batch, f"Batch {batch} is missing from the log."))
    return Plan(step=step, from_checkpoint=step > 0, next_batch=end)


def decide_trainer(paths: RunPaths, kind: str) -> Plan:
    """Plan for a trainer alone, and verify every byte that it will read. Raises: Refusal."""
    listing = survey(paths)
    while True:
        chosen = plan_trainer(listing, kind)
        checked = _verify_replay(paths, chosen, listing)
        if checked == listing:
            return chosen
        listing = checked


def apply(stage: Stage, chosen: Plan, attempt: int) -> None:
    """Carry a committed plan out. Repeating it after a crash inside changes nothing more."""
    paths = stage.paths
    aside = paths.superseded / f"{attempt:03d}"
    for name in chosen.supersede:
        target = aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.move(paths.root / name, target)
        durable.crash_point("rollback.moved")
    kept = aside if chosen.rollback or chosen.cuts_log else None  # otherwise the same rows are made again
    _rewind(stage, paths.metric("trainer"), chosen.step, kept)
    restore_rows(stage, chosen.next_batch, aside=kept)


def restore_rows(stage: Stage, next_batch: int, *, aside: Path | None = None) -> None:
    """Make the orchestrator's metric files and its ledger say what its published parts say: cut, and completed.

    A row is born inside its batch or evaluation: one that was not appended before a crash is appended now.
    """
    paths = stage.paths
    evals = list(durable.committed(paths.evals))
    _rewind(stage, paths.metric("orchestrator"), next_batch, aside)
    _rewind(stage, paths.metric("evals"), max(evals, default=-1), aside)
    ledger.restore(stage, next_batch, aside=aside)
    rows = metrics.read(paths.metric("orchestrator"))
    last = rows[-1]["step"] if rows else 0
    for step in range(last, next_batch):
        if paths.batch(step).exists():
            row = batchlog.read_metrics(paths.batch(step))
            metrics.append(stage, paths.metric("orchestrator"), row, flush=True)
    known = {row["step"] for row in metrics.read(paths.metric("evals"))}
    for step in evals:
        if step not in known:
            row = batchlog.read_metrics(paths.eval(step))
            metrics.append(stage, paths.metric("evals"), row, flush=True)


def _rewind(stage: Stage, path: Path, limit: int, aside: Path | None) -> None:
    """Cut the rows past `limit`; what is cut is kept in `aside`, if that is given."""
    if aside is not None:
        cut = [row for row in metrics.read(path) if row["step"] > limit]
        if cut:
            (aside / "metrics").mkdir(parents=True, exist_ok=True)
            lines = b"".join(msgspec.json.encode(row) + b"\n" for row in cut)
            stage.replace(aside / "metrics" / path.name, lines)
    metrics.rewind(stage, path, limit)
