"""Checkpoints: one directory, one manifest, one commit for the trainer's and the orchestrator's state.

    checkpoints/step_v/trainer/            what the trainer's ranks wrote
    checkpoints/step_v/orchestrator/       the state that rode in batch v-1, copied
    checkpoints/step_v/MANIFEST.json

Retention and pruning live here too: they run after a commit, never before, and only the trainer's rank 0
calls them.
"""

from pathlib import Path
from typing import Any

import msgspec

from ratchet import batchlog, durable
from ratchet.config import CkptConfig
from ratchet.inputs.tree import Inputs
from ratchet.paths import RunPaths
from ratchet.records import FileEntry, Manifest
from ratchet.stage import Stage

TRAINER = "trainer"
ORCHESTRATOR = "orchestrator"
STATE = f"{ORCHESTRATOR}/state.json"


def begin(stage: Stage, step: int) -> Path:
    """A staged directory with a `trainer/` folder in it, for all ranks to write into."""
    directory = stage.begin(f"checkpoint_{step}")
    (directory / TRAINER).mkdir()
    return directory


def is_committed(paths: RunPaths, step: int) -> bool:
    return durable.read_committed(paths.checkpoint(step)) is not None


def inputs(paths: RunPaths, step: int) -> Inputs | None:
    """What a run read when it saved this checkpoint; None in one of a version before there were names of inputs."""
    stated = durable.read_manifest(paths.checkpoint(step)).meta.get("inputs")
    return None if stated is None else msgspec.convert(stated, Inputs)


def copy_orchestrator_state(stage: Stage, directory: Path, step: int) -> list[FileEntry]:
    """Take the orchestrator's part from the log: its state just after batch step-1.

    Returns the entries to commit. Raises: Damaged if the batch is not sound: then there is no checkpoint either.
    """
    batch = stage.paths.batch(step - 1)
    target = directory / STATE
    target.parent.mkdir()
    target.write_bytes(batchlog.read_state(batch))
    return durable.seal(directory, [STATE])


def commit(
    stage: Stage,
    directory: Path,
    *,
    step: int,
    attempt: int,
    world_size: int,
    entries: list[FileEntry],
    meta: dict[str, Any],
    versions: dict[str, str],
) -> Manifest:
    """Make checkpoint `step` true. `entries` are all ranks' sealed files, relative to `directory`."""
    manifest = Manifest(
        kind="checkpoint",
        step=step,
        attempt=attempt,
        world_size=world_size,
        files=tuple(entries),
        meta=meta,
        versions=versions,
    )
    return stage.commit(directory, stage.paths.checkpoint(step), manifest)


def kept(steps: list[int], ckpt: CkptConfig) -> list[int]:
    """Which of the committed steps retention keeps; without a rule, all."""
    if ckpt.keep_last is None and ckpt.keep_interval is None:
        return steps
    newest = set(steps[-(ckpt.keep_last or 1) :])
    return [s for s in steps if s in newest or (ckpt.keep_interval and s % ckpt.keep_interval == 0)]


def reasons(step: int, steps: list[int], ckpt: CkptConfig | None) -> list[str]:
    """Why retention keeps a committed step, in the words of `ckpt ls`; empty for one that the next save lets go."""
    if ckpt is None or (ckpt.keep_last is None and ckpt.keep_interval is None):
        return ["newest"] if step == steps[-1] else ["no rule"]
    found = ["newest"] if step == steps[-1] else []
    if step in steps[-(ckpt.keep_last or 1) :] and ckpt.keep_last:
        found.append("keep-last")
    if ckpt.keep_interval and step % ckpt.keep_interval == 0:
        found.append("keep-interval")
    return found


def retain(stage: Stage, ckpt: CkptConfig) -> list[int]:
    """Delete what the rules do not keep, after the newest one was read back.

    Returns the steps that went. Raises: Damaged if the newest does not verify: then nothing goes.
    """
    steps = list(durable.committed(stage.paths.checkpoints))
    gone = sorted(set(steps) - set(kept(steps, ckpt)))
    if gone:
        durable.verify(stage.paths.checkpoint(steps[-1]))
    for step in gone:
        stage.remove(stage.paths.checkpoint(step))
    return gone


def prune(
    stage: Stage,
    ckpt: CkptConfig | None,
    *,
    published: int,
    oldest_served: int,
    async_level: int,
    saving: int | None = None,
) -> None:
    """Delete what neither a resume nor a server can need: after policy `published`, and after a retention.

    `saving` is the step of a save in flight: what its checkpoint will pin is kept already.
    """
    _prune_batches(stage, ckpt, published)
    # By their names: this runs after every step, and a run may keep thousands. One that is not sound pins no less.
    checkpoints = {*durable.steps(stage.paths.checkpoints), *([] if saving is None else [saving])}
    _prune_weights(stage, oldest_served, published, async_level, checkpoints)


def _prune_batches(stage: Stage, ckpt: CkptConfig | None, published: int) -> None:
    """Without checkpoints a consumed batch is done, except the last: a restarted orchestrator needs its state.

    With `keep_last` batches stay from the oldest of the newest K checkpoints on; without it all stay, so that
    step 0 remains an implicit checkpoint. The newest one of the log always stays: a restarted orchestrator begins
    with its state, and with its row if that was not appended.
    """
    if ckpt is None:
        oldest = published - 1
    elif ckpt.keep_last is None:
        return
    else:
        steps = durable.newest_committed(stage.paths.checkpoints, ckpt.keep_last)
        if not steps:
            return
        oldest = steps[0]
    newest = max(durable.steps(stage.paths.batches), default=0)
    for step in _steps_below(stage.paths.batches, min(oldest, newest)):
        stage.remove(stage.paths.batch(step))


def _prune_weights(
    stage: Stage, oldest_served: int, newest: int, async_level: int, checkpoints: set[int]
) -> None:
    """Delete published policies below the oldest that a server may still hold.

    Kept are the newest that is there (some go through memory alone), those of every checkpoint, and for each
    checkpoint v the policies v - async_level .. v, which sample the first batches after a resume there.
    """
    there = durable.steps(stage.paths.weights)
    pinned = {max((step for step in there if step <= newest), default=newest)}
    for step in checkpoints:
        pinned |= set(range(step - async_level, step + 1))
    for step in there:
        if step < oldest_served and step not in pinned:
            stage.remove(stage.paths.weight(step))


def _steps_below(root: Path, limit: int) -> list[int]:
    return [step for step in durable.steps(root) if step < limit]
