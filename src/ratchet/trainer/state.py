"""Save and restore the trainer: DCP for model and optimizer shards, JSON for the small rest.

    main thread     take what changes every step ─► staging copy (async) ─► next step
    save thread     each rank's shard, sealed while it is written ─► rank 0 commits ─► retention

A synchronous save runs the same story on the main thread. One save is in flight at most; any exception in it
means "no checkpoint" and surfaces at the next step.
"""

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import PreTrainedModel

from ratchet import attempts, checkpoint, durable, metrics, process
from ratchet.attempts import Assignment
from ratchet.audit_rows import DATA_ROWS, ROWS_FROM
from ratchet.config import RLConfig
from ratchet.errors import RatchetError, Refusal, SaveFailed
from ratchet.inputs import seen
from ratchet.log import LOGGER
from ratchet.models import adapters
from ratchet.models.trainable import saved_buffers
from ratchet.records import FileEntry, Progress
from ratchet.timeline import Timeline
from ratchet.trainer import schedule, shards
from ratchet.trainer.optim import Optimizer
from ratchet.trainer.schedule import ScheduleRecord
from ratchet.trainer.staging import Staging
from ratchet.trainer.world import World

PROGRESS = "progress.json"
SCHEDULER = "scheduler.json"
OPTIMIZER_STEPS = "optimizer_steps.json"


@dataclass
class TrainerState:
    """What a checkpoint holds of the trainer."""

    model: PreTrainedModel
    optimizer: Optimizer
    progress: Progress
    base: str | None = None
    """The digest of the model beside which adapters are trained; None where the model itself is."""

    def tensors(self) -> dict[str, Any]:
        """References to the live tensors, in the layout of the checkpoint: shared ones once, adapters alone."""
        model = {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if self.base is None or parameter.requires_grad
        }
        if self.base is None:
            model |= saved_buffers(self.model)
        return {"model": model, "optimizer": self.optimizer.tensors()}

    def tensors_of(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a saved checkpoint. One of an older version holds no buffers: they stay what the base's are."""
        buffers = {f"model.{name}" for name in saved_buffers(self.model)} - schema.keys()
        return {
            part: {name: tensor for name, tensor in tensors.items() if f"{part}.{name}" not in buffers}
            for part, tensors in self.tensors().items()
        }


class Checkpointer:
    """Saves and restores one trainer."""

    def __init__(
        self,
        assignment: Assignment,
        world: World,
        timeline: Timeline,
        on_commit: Callable[[int], None],
        data_rows: int | None = None,
    ) -> None:
        """`data_rows`: how many rows the demonstrations have, for the audit."""
        self._timeline = timeline
        self._assignment = assignment
        self._config = assignment.config
        self._world = world
        self._on_commit = on_commit
        self._rows_meta = {} if data_rows is None else {DATA_ROWS: data_rows, ROWS_FROM: 0}
        self._thread: threading.Thread | None = None
        self.saving: int | None = None
        """The step of a save in flight."""
        self._error: BaseException | None = None
        self._failures = 0
        self._staging = Staging(world.device)

    def restore(self, state: TrainerState, step: int) -> None:
        """Load checkpoint `step` into the live tensors.

        Raises: Refusal if its tensors, its base or its learning rate do not fit this configuration.
        """
        directory = self._assignment.paths.checkpoint(step)
        if state.base is not None:
            adapters.check_base(directory, state.base)
        meta = durable.read_manifest(directory).meta
        tensors = state.tensors_of(meta["schema"])
        _check_schema(directory, meta["schema"], _schema(tensors))
        if self._rows_meta:  # a checkpoint of an older version does not say so
            self._rows_meta[ROWS_FROM] = meta.get(ROWS_FROM, step)
        folder = directory / checkpoint.TRAINER
        record = msgspec.json.decode((folder / SCHEDULER).read_bytes(), type=ScheduleRecord)
        schedule.check_record(record, self._config.trainer, self._config.max_steps, step)
        load(tensors, storage_reader=FileSystemReader(folder))
        state.optimizer.set_steps(msgspec.json.decode((folder / OPTIMIZER_STEPS).read_bytes()))
        state.progress = msgspec.json.decode((folder / PROGRESS).read_bytes(), type=Progress)

    def save(self, state: TrainerState) -> bool:
        """Commit the state as checkpoints/step_{progress.step}; one that is committed already is a no-op.

        Returns whether it is committed, or, with `save_async`, begun.

        Waits for: the save before this one; with `save_async`, then only for the copy of the state.
        Raises: SaveFailed (see `poll`)
        """
        self._join()
        step = state.progress.step
        if self._world.share(checkpoint.is_committed(self._assignment.paths, step)):
            return True
        directory, meta = self._begin(state)
        if directory is None:
            self.poll()
            return False
        self.saving = step
        tensors = state.tensors()
        if self._config.ckpt.save_async or self._world.device.type == "cuda":
            with self._timeline.phase("copy", step):
                # The buffers are free again: the save before has ended.
                tensors = self._staging.copy(tensors)
        if not self._config.ckpt.save_async:
            self._run(step, directory, meta, tensors)
            has_failed = self._error is not None
            self.poll()
            return not has_failed
        self._thread = threading.Thread(
            target=self._run, args=(step, directory, meta, tensors), name=f"save-{step}", daemon=True
        )
        self._thread.start()
        return True

    def poll(self) -> None:
        """Look how the last save ended, without waiting for it.

        A failed one is said and the run goes on: the next interval tries again.
        Raises: SaveFailed after `ckpt.max_failed_saves` failures in a row; Fenced
        """
        error, self._error = self._error, None
        if error is None:
            return
        if isinstance(error, RatchetError):
            raise error
        self._failures += 1
        said = (
            f"a checkpoint could not be written ({self._failures} in a row): {process.why(error)}. "
            "Older checkpoints are untouched"
        )
        if self._failures >= self._config.ckpt.max_failed_saves:
            raise SaveFailed(f"{said}; make room, then run the same command again.") from error
        LOGGER.error("%s; the next interval tries again.", said)

    def settle(self) -> None:
        """Let the save in flight end, before a crash that has nothing to do with it ends the process."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Wait for the save in flight. Raises: SaveFailed if the last save failed: nothing comes after it."""
        self._join()
        if self._failures:
            raise SaveFailed(
                "The last checkpoint could not be written: make room, then run the same command again."
            )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _begin(self, state: TrainerState) -> tuple[Path | None, dict[str, Any]]:
        """Write the small files and take the marks that belong to this step, before anything moves on.

        All ranks get the directory, or None if rank 0 could not write there.
        """
        directory, meta = None, {}
        if self._world.is_first:
            try:
                directory, meta = self._write_small(state)
            except OSError as error:
                self._error = error
        return self._world.share(directory), meta

    def _write_small(self, state: TrainerState) -> tuple[Path, dict[str, Any]]:
        step = state.progress.step
        directory = checkpoint.begin(self._assignment.stage, step)
        folder = directory / checkpoint.TRAINER
        record = schedule.record(self._config.trainer, self._config.max_steps, step)
        (folder / PROGRESS).write_bytes(msgspec.json.encode(state.progress))
        (folder / SCHEDULER).write_bytes(msgspec.json.encode(record))
        (folder / OPTIMIZER_STEPS).write_bytes(msgspec.json.encode(state.optimizer.steps()))
        rows = self._assignment.paths.metric("trainer")
        durable.fsync_path(rows)
        run = self._assignment
        inputs = msgspec.to_builtins(seen.with_notes(run.paths, run.attempt, run.inputs))
        schema = _schema(state.tensors())
        meta = {"metrics": metrics.mark(rows), "schema": schema, "inputs": inputs, **self._rows_meta}
        return directory, meta if state.base is None else meta | {"base": state.base}

    def _run(self, step: int, directory: Path, meta: dict[str, Any], tensors: dict[str, Any]) -> None:
        try:
            with self._timeline.phase("save", step):
                self._write(step, directory, meta, tensors)
            self._failures = 0
        except BaseException as error:
            self._error = error
            if self._world.is_first:
                shutil.rmtree(directory, ignore_errors=True)  # it may be what fills the disk
        self.saving = None

    def _write(self, step: int, directory: Path, meta: dict[str, Any], tensors: dict[str, Any]) -> None:
        durable.crash_point("checkpoint.before_shards")
        at_once = 1 if self._config.ckpt.save_async else shards.FILES  # the training has the other core
        entries = shards.write(directory, tensors, self._world.save_group, at_once=at_once)
        durable.crash_point("checkpoint.after_shards")
        entries = self._gather(entries)
        if not self._world.is_first:
            return
        entries += shards.seal_others(directory)
        stage = self._assignment.stage
        if isinstance(self._config, RLConfig):
            entries += checkpoint.copy_orchestrator_state(stage, directory, step)
        checkpoint.commit(
            stage,
            directory,
            step=step,
            attempt=self._assignment.attempt,
            world_size=self._world.size,
            entries=entries,
            meta=meta,
            versions=attempts.environment(),
        )
        self._on_commit(step)

    def _gather(self, entries: list[FileEntry]) -> list[FileEntry]:
        if self._world.size == 1:
            return entries
        parts: list[Any] | None = [None] * self._world.size if self._world.is_first else None
        dist.gather_object(entries, parts, dst=0, group=self._world.save_group)
        return [entry for part in parts or [] for entry in part]


def _schema(state: dict[str, Any]) -> dict[str, list[Any]]:
    """Name, dtype and global shape of every tensor."""
    return {
        f"{part}.{name}": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for part, tensors in state.items()
        for name, tensor in tensors.items()
    }


def _check_schema(directory: Path, saved: dict[str, list[Any]], live: dict[str, list[Any]]) -> None:
    """Raises: Refusal; DCP itself would cast a wrong dtype in silence."""
    for name in sorted({*saved, *live}):
        if saved.get(name) != live.get(name):
            raise Refusal(
                f"{directory} does not fit this configuration: {name} is {saved.get(name, 'missing')} there and "
                f"{live.get(name, 'missing')} here; restore the model and optimizer settings of the run."
            )
