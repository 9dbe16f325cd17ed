"""Open an attempt: lock ─► finish an open intent ─► plan ─► record ─► apply.

Nothing of the run is touched before the record, which is the commit of the plan; everything after it may be
repeated by the next start.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ratchet import attempts, checkpoint, config_io, durable, metrics, process, resume
from ratchet.attempts import Lock, Outcome, Plan, Record
from ratchet.config import OnResume, RLConfig, RunConfig, SFTConfig
from ratchet.errors import EXIT_OK, RatchetError, Refusal
from ratchet.inputs import code, files, seen
from ratchet.inputs.seen import Seen
from ratchet.inputs.tree import LATE, WEIGHTS, Inputs, undone
from ratchet.memory import Memory
from ratchet.mirror import upload as uploading
from ratchet.mirror.restore import restore
from ratchet.paths import RunPaths, step_name
from ratchet.stage import Stage
from ratchet.trainer import schedule

_SAVING = {f"ckpt.{name}" for name in ("interval", "save", "keep_last", "keep_interval", "mirror")}
"""Free to change, and said: one that is left out by mistake would be missed when it is too late."""

Check = Callable[[Seen], None]
"""Refuses input that no program could use, and adds what it finds to what was seen. Raises: Refusal"""


@dataclass
class Attempt:
    """An open attempt: the launcher holds the lock and its own workshop."""

    paths: RunPaths
    lock: Lock
    stage: Stage
    record: Record
    config: RunConfig
    memory: Memory | None = None

    def close(self, code: int, reason: str, *, others_go_on: bool = False) -> None:
        """Record the outcome and leave no workshop behind.

        With `others_go_on` a joined orchestrator keeps its own after a success: it may owe the last evaluation.
        """
        if self.memory is not None:
            self.memory.close()
        self.record = attempts.write(
            self.stage, msgspec.structs.replace(self.record, outcome=Outcome(code, reason))
        )
        Stage.current = None
        if not (others_go_on and code == EXIT_OK):
            self.stage.revoke()
        shutil.rmtree(self.stage.directory)
        self.lock.release()


def open_attempt(kind: str, config: RunConfig, check: Check) -> Attempt | Plan:
    """Take the lock, plan and apply; or return the plan of a run that is complete already.

    `check` runs when there is work to be done.

    Raises: Refusal, before anything of the run was touched.
    """
    paths = RunPaths(config.output_dir)
    with _leaving_nothing(paths), _refusing(paths):
        paths.root.mkdir(parents=True, exist_ok=True)
        paths.staging.mkdir(exist_ok=True)
        lock = Lock(paths)
        lock.acquire()
        _look_at_the_mirror(kind, config, paths, lock)
        return _open(kind, config, check, paths, lock)


@contextmanager
def _leaving_nothing(paths: RunPaths) -> Iterator[None]:
    """A start that is refused where nothing was leaves nothing."""
    made = [path for path in (paths.root, *paths.root.parents) if not path.exists()]
    was_empty = bool(made) or not _names(paths.root)
    try:
        yield
    except Refusal:
        if was_empty and set(_names(paths.root)) <= {paths.lock.name, paths.staging.name}:
            with contextlib.suppress(OSError):  # another start may have come meanwhile
                paths.staging.rmdir()
                paths.lock.unlink()
                for directory in made:
                    directory.rmdir()
        raise


@contextmanager
def _refusing(paths: RunPaths) -> Iterator[None]:
    """A run directory that cannot be written is bad input, as long as nothing was started. Raises: Refusal"""
    try:
        yield
    except OSError as error:
        if process.is_about(error, paths.root) or not paths.staging.is_dir():
            raise Refusal(
                f"The run directory {paths.root} cannot be written ({process.reason(error)}): make it writable, "
                "or choose another --output-dir."
            ) from None
        raise


def _look_at_the_mirror(kind: str, config: RunConfig, paths: RunPaths, lock: Lock) -> None:
    """Restore a run whose disk is gone; otherwise see that the mirror is this run's. Raises: Refusal"""
    if config.ckpt is None or config.ckpt.mirror is None:
        return
    try:
        last = attempts.newest(paths)
        if last is None:
            restore(paths, _next_number(paths), config, lambda old, its: _asked(kind, config, old, its))
        else:
            uploading.check(config.ckpt.mirror, last.run_id)
    except BaseException:
        lock.release()
        raise


def _asked(kind: str, config: RunConfig, last: Record, old: RunConfig) -> int | None:
    """The step of its mirror that a command wants back, None for the newest. Raises: Refusal"""
    assert config.ckpt is not None
    _check_kind(kind, config, last)
    _check_changes(old, config)
    if config_io.is_same(old, config):
        return None
    if config.ckpt.resume_step is None:
        raise Refusal(
            f"The mirror {config.ckpt.mirror} holds a run that was started by another command: continue it with "
            "--ckpt.resume-step -1, or give the new run another --ckpt.mirror."
        )
    return config.ckpt.resume_step if config.ckpt.resume_step >= 0 else None


def _check_kind(kind: str, config: RunConfig, last: Record) -> None:
    if last.kind != kind:
        raise Refusal(
            f"{config.output_dir} holds a run of `{last.kind}`: give this one another --output-dir."
        )


def _open(kind: str, config: RunConfig, check: Check, paths: RunPaths, lock: Lock) -> Attempt | Plan:
    last = attempts.newest(paths)
    number = _next_number(paths)
    stage = Stage.open(paths, attempts.token(number, "launcher", 0))
    memory: Memory | None = None
    try:
        stage.revoke()
        if last is not None:
            with contextlib.suppress(RatchetError):  # settings that cannot be read are judged below
                Memory.sweep(attempts.read_config(paths, last), last.run_id)
        if last is not None and not last.applied:
            last = _carry_out(stage, last)
        chosen, announced = decide(kind, paths, config, last)
        if not chosen.complete:
            found = _look(paths, config, last if has_produced(paths) else None, chosen)
            check(found)
            record = _begin(stage, kind, config, number, last, chosen, announced, found)
            memory = Memory.open(config, record.run_id, number)  # before anybody can join
            record = _carry_out(stage, record)
            stage.enter()
            return Attempt(paths, lock, stage, record, config, memory)
    except BaseException:
        if memory is not None:
            memory.close()
        shutil.rmtree(stage.directory, ignore_errors=True)
        lock.release()
        raise
    shutil.rmtree(stage.directory)
    lock.release()
    return chosen


def _next_number(paths: RunPaths) -> int:
    """Above every number that an attempt or a workshop ever had, so that no token is used twice."""
    names = [*_names(paths.attempts), *_names(paths.staging)]
    numbers = [n.partition(".")[0] for n in names]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=0)


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.exists() else []


def decide(
    kind: str, paths: RunPaths, config: RunConfig, last: Record | None
) -> tuple[Plan, tuple[str, ...]]:
    announced: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    has_run = last is not None and has_produced(paths)
    if last is not None and has_run:
        _check_kind(kind, config, last)
        old = attempts.read_config(paths, last)
        differences = config_io.differences(old, config)
        announced = _check_changes(old, config)
    ckpt = config.ckpt
    request = resume.Request(
        kind=kind,
        max_steps=config.max_steps,
        resume_step=ckpt.resume_step if ckpt else None,
        has_run=has_run,
        is_same=has_run and not differences,
        differences=differences,
        was_finished=has_run
        and last is not None
        and last.outcome is not None
        and last.outcome.code == EXIT_OK,
        on_corrupt=ckpt.on_corrupt if ckpt else "stop",
    )
    chosen = resume.decide(paths, request)
    if last is not None and not has_run and paths.weight(0).exists():
        # Initial weights of settings that may have been others: nobody may adopt them before they are made again.
        chosen = msgspec.structs.replace(chosen, supersede=(f"weights/{step_name(0)}",))
    return chosen, announced


def has_produced(paths: RunPaths) -> bool:
    """Whether anything here is worth continuing. An attempt that failed before its first step leaves nothing that
    would have to fit the next one: initial weights are published again."""
    parts = (paths.checkpoints, paths.batches, paths.evals)
    return (
        any(durable.steps(part) for part in parts)
        or any(step > 0 for step in durable.steps(paths.weights))
        or bool(metrics.read(paths.metric("trainer")))
    )


def _look(paths: RunPaths, config: RunConfig, last: Record | None, chosen: Plan) -> Seen:
    """What this start holds its inputs against: the names that held where it continues. Raises: Refusal"""
    known = Inputs() if last is None else inherited(paths, last, chosen)
    needs_weights = files.has_weights(config.model) and (
        not chosen.from_checkpoint or config.model.lora is not None or WEIGHTS not in known.groups
    )
    step = max(chosen.step, chosen.next_batch)
    found = Seen(known, accepts=config.accept_changes, step=step, needs_weights=needs_weights)
    if late := known.groups.get(LATE):
        found.add({LATE: code.of_modules(late)})
    return found


def inherited(paths: RunPaths, last: Record, chosen: Plan) -> Inputs:
    """The names of a run's inputs where a plan continues: a rollback brings back those of its checkpoint."""
    found = seen.known(paths, last)
    if chosen.rollback:
        stated = checkpoint.inputs(paths, chosen.step) if chosen.from_checkpoint else None
        if stated is not None:
            return stated
        return undone(found, at=chosen.step, is_rollback=True)
    return undone(found, at=chosen.next_batch, is_rollback=False) if chosen.cuts_log else found


def _check_changes(old: RunConfig, new: RunConfig) -> tuple[str, ...]:
    """What is said aloud about a changed configuration. Raises: Refusal for a fixed key."""
    found = config_io.changes(old, new)
    fixed = [str(change) for change in found if change.mark is OnResume.FIXED]
    if fixed and new.ckpt is not None and new.ckpt.resume_step is not None:
        raise Refusal(
            f"A resumed run may not change {'; '.join(fixed)}: restore the old value, "
            "or start a new run with another --output-dir."
        )
    announced = tuple(
        str(change) for change in found if change.mark is OnResume.ANNOUNCED or change.key in _SAVING
    )
    return announced + _horizon_moves(old, new)


def _horizon_moves(old: RunConfig, new: RunConfig) -> tuple[str, ...]:
    """A horizon that is not stated follows max_steps: extending the run then bends the learning rate."""
    if not isinstance(old, SFTConfig | RLConfig) or not isinstance(new, SFTConfig | RLConfig):
        return ()
    before, after = (schedule.horizon(c.trainer.scheduler, c.max_steps) for c in (old, new))
    if before == after or new.trainer.scheduler.type == "constant":
        return ()
    return (f"trainer.scheduler.horizon_steps: {before} -> {after} (it follows max_steps unless it is set)",)


def _begin(
    stage: Stage,
    kind: str,
    config: RunConfig,
    number: int,
    last: Record | None,
    chosen: Plan,
    announced: tuple[str, ...],
    found: Seen,
) -> Record:
    """Commit the intent: the attempt's configuration, then its record with the plan."""
    paths = stage.paths
    announced += _about_inputs(found, has_run=last is not None and has_produced(paths))
    environment = attempts.environment()
    if last is not None:
        announced += tuple(
            f"{name}: {last.environment.get(name)} -> {environment.get(name)}"
            for name in {**last.environment, **environment}
            if environment.get(name) != last.environment.get(name)
        )
    paths.attempt(number).mkdir(parents=True, exist_ok=True)
    resolved = config_io.to_toml(config)
    stage.replace(paths.attempt(number) / "run.toml", resolved)
    lineage = last.lineage if last else 0
    record = Record(
        attempt=number,
        kind=kind,
        run_id=last.run_id if last else secrets.token_hex(6),
        lineage=lineage + 1 if chosen.rollback or chosen.cuts_log else lineage,
        argv=attempts.argv(),
        resume_step=config.ckpt.resume_step if config.ckpt else None,
        plan=chosen,
        announced=announced,
        environment=environment,
        inputs=found.inputs,
        config_xxh3=durable.hash_bytes(resolved),
    )
    return attempts.write(stage, record)


def _about_inputs(found: Seen, *, has_run: bool) -> tuple[str, ...]:
    """What is said aloud about the inputs: changes that are accepted now, names that there were none of before."""
    said = tuple(f"accepted {entry}" for entry in found.inputs.accepted if entry not in found.before.accepted)
    if has_run and not found.before.groups:
        said += (
            "this run was begun without names of its inputs: those of now are recorded, and hold from here on",
        )
    return said


def _carry_out(stage: Stage, record: Record) -> Record:
    """Apply the plan of a record and say so in it; the second half of a start, or of one that died."""
    paths = stage.paths
    for directory in (
        paths.batches,
        paths.weights,
        paths.checkpoints,
        paths.evals,
        paths.journal,
        paths.metrics,
        paths.timelines,
        paths.superseded,
    ):
        directory.mkdir(exist_ok=True)
    resume.apply(stage, record.plan, record.attempt)
    stage.replace(paths.run_file, (paths.attempt(record.attempt) / "run.toml").read_bytes())
    return attempts.write(stage, msgspec.structs.replace(record, applied=True))
