"""A new run that begins at a checkpoint of another one: cheap, because what is published is immutable.

Published directories are hard links; rows and lines, which grow, are copied up to the step. The lineage stands in
the record of the new run's first attempt.
"""

import secrets
from pathlib import Path

import msgspec

from ratchet import attempts, checkpoint, config_io, device_notes, durable, ledger, metrics
from ratchet.attempts import ForkedFrom, Outcome, Plan, Record
from ratchet.config import RLConfig, RunConfig
from ratchet.errors import EXIT_STOPPED, Refusal
from ratchet.paths import RunPaths, step_name
from ratchet.stage import Stage


class Forked(msgspec.Struct, frozen=True):
    """What a fork made."""

    run: str
    run_id: str
    step: int
    forked_from: ForkedFrom


def fork(source: RunPaths, step: int, target: Path) -> Forked:
    """Make the run directory `target` from checkpoint `step` of `source`, every byte of the checkpoint verified.

    Raises: Refusal if there is no such checkpoint or the name is taken; Damaged.
    """
    there = list(durable.committed(source.checkpoints))
    if step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise Refusal(f"{source.root} has no sound checkpoint of step {step}; there are: {known}.")
    record = attempts.newest(source)
    if record is None:
        raise Refusal(f"{source.root} holds no run.")
    config = attempts.read_config(source, record)
    with durable.new_directory(target) as staged:
        paths = RunPaths(staged)
        _link(source, paths, step, config)
        durable.verify(paths.checkpoint(step))
        _copy_lines(source, paths, step)
        made = _record(source, paths, step, record, config.model_copy(update={"output_dir": target}))
    return Forked(str(target), made.run_id, step, ForkedFrom(str(source.root), record.run_id, step))


def _link(source: RunPaths, paths: RunPaths, step: int, config: RunConfig) -> None:
    """The checkpoint, the policies that sample the first batches after it, and what is left of what led to it."""
    ahead = config.max_async_level if isinstance(config, RLConfig) else 0
    wanted = {
        "checkpoints": {step},
        "weights": set(range(step - ahead, step + 1)),
        "batches": set(range(step)),
        "evals": set(range(step + 1)),
    }
    for name, steps in wanted.items():
        (paths.root / name).mkdir()
        for found in durable.committed(source.root / name):
            if found in steps:
                durable.link_tree(source.root / name / step_name(found), paths.root / name / step_name(found))


def _copy_lines(source: RunPaths, paths: RunPaths, step: int) -> None:
    """The metric rows up to policy `step`, and the ledger of the batches that led to it."""
    for directory in (paths.metrics, paths.superseded, paths.staging, paths.ledger.parent):
        directory.mkdir()
    for role in ("trainer", "orchestrator", "evals"):
        lines = metrics.lines_until(source.metric(role), step)
        if lines:
            paths.metric(role).write_bytes(lines)
    if lines := ledger.lines_below(source.ledger, step):
        paths.ledger.write_bytes(lines)


def _record(source: RunPaths, paths: RunPaths, step: int, last: Record, config: RunConfig) -> Record:
    """The first attempt of the new run: one that stopped at `step`."""
    directory = paths.attempt(1)
    directory.mkdir(parents=True)
    data = config_io.to_toml(config)
    (directory / "run.toml").write_bytes(data)
    paths.run_file.write_bytes(data)
    for number in attempts.numbers(source):  # the newest note of each program stays
        device_notes.copy(source.attempt(number), directory)
    stated = checkpoint.inputs(paths, step)
    is_rl = isinstance(config, RLConfig)
    stage = Stage.open(paths, attempts.token(1, "fork", 0))
    made = attempts.write(
        stage,
        Record(
            attempt=1,
            kind=last.kind,
            run_id=secrets.token_hex(6),
            lineage=0,
            argv=attempts.argv(),
            resume_step=None,
            plan=Plan(step=step, from_checkpoint=True, next_batch=step if is_rl else 0),
            applied=True,
            outcome=Outcome(EXIT_STOPPED, f"forked from {source.root} at step {step}"),
            environment=last.environment,
            inputs=msgspec.UNSET if stated is None else stated,
            forked_from=ForkedFrom(str(source.root), last.run_id, step),
            config_xxh3=durable.hash_bytes(data),
        ),
    )
    stage.leave()
    return made
