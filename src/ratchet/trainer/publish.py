"""Publish the policy after `step` updates as weights/step_{step}.

    main thread      gather to host memory ─► next step
    publish thread   write ─► hash ─► commit ─► what older policies held may go

With `weights.transport = "memory"` it is published in memory, and some policies are copied from there:

    publish thread   fill mapped pages, hash them ─► commit in memory: servers may adopt ─► what older ones held may go
    copy thread      those that outlive the attempt: copy ─► commit on the disk

Policies are published one after the other: each waits for the one before it. A checkpoint waits for both threads.
"""

import threading
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from ratchet import durable, memory, weights
from ratchet.attempts import Assignment
from ratchet.config import RLConfig
from ratchet.log import LOGGER
from ratchet.models import adapters, build, naming
from ratchet.models.tensors import full_tensors
from ratchet.timeline import Timeline
from ratchet.trainer.shelf import Shelf
from ratchet.trainer.world import World


class Publisher:
    """Writes policies beside the training; the same content under the same name is a no-op."""

    def __init__(self, assignment: Assignment, world: World, timeline: Timeline) -> None:
        self._assignment = assignment
        self._world = world
        self._timeline = timeline
        self._publishing: threading.Thread | None = None
        self._copying: threading.Thread | None = None
        self._copied: int | None = None
        """The step that is being copied: it stays in memory until it is."""
        self._error: BaseException | None = None
        self._was_said = False
        self._host: dict[str, torch.Tensor] | None = {} if isinstance(assignment.config, RLConfig) else None
        """What every policy is gathered into; free again once it is written. SFT publishes too seldom to keep it."""
        paths = assignment.memory if world.is_first else None
        self._shelf = Shelf(assignment, paths) if paths is not None else None

    def publish(
        self, model: PreTrainedModel, step: int, on_commit: Callable[[], None] = lambda: None
    ) -> None:
        """Begin to publish; `on_commit` runs in the thread that does it. Every rank calls this: shards are gathered.

        Waits for: the policy before this one, but not for its copy.
        Raises: what that one failed of.
        """
        with self._timeline.phase("gather", step):
            _join(self._publishing)
            self.poll()
            tensors = self._gather(model)
        if not self._world.is_first:
            return
        self._publishing = threading.Thread(
            target=self._run, args=(model, tensors, step, on_commit), name=f"publish-{step}", daemon=True
        )
        self._publishing.start()

    def _gather(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        tensors = full_tensors(model, is_kept=self._world.is_first, into=self._host)
        lora = self._assignment.config.model.lora
        return tensors if lora is None or not self._world.is_first else adapters.merged(tensors, lora)

    def poll(self) -> None:
        """Raise what publishing has failed of, if it has, without waiting for it."""
        error = self._error
        if error is not None:
            self._error = None
            raise error

    def wait(self) -> None:
        """Wait until what was begun is published, and copied. Raises: what it failed of"""
        self.settle()
        self.poll()

    def settle(self) -> None:
        """Let what was begun end, before a crash that has nothing to do with it ends the process."""
        _join(self._publishing)
        _join(self._copying)

    def _run(
        self,
        model: PreTrainedModel,
        tensors: dict[str, torch.Tensor],
        step: int,
        on_commit: Callable[[], None],
    ) -> None:
        try:
            with self._timeline.phase("publish", step):
                tensors = naming.outward(model, tensors)
                if self._shelf is None:
                    self._write(tensors, step)
                else:
                    self._put(self._shelf, tensors, step)
            on_commit()
        except BaseException as error:
            self._error = error

    def _write(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        stage = self._assignment.stage
        directory = stage.begin(f"weights_{step}")
        build.save(directory, tensors, self._assignment.config.model)
        manifest = weights.describe(directory, step=step, attempt=self._assignment.attempt)
        self._make_room(step, weights.digest(manifest))
        stage.commit(directory, self._assignment.paths.weight(step), manifest)

    def _put(self, shelf: Shelf, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Publish in memory, and begin with the copy of a policy that outlives the attempt."""
        if shelf.publish(tensors, step):
            self._say(step)
        if step == self._assignment.plan.step or memory.outlives(self._assignment.config, step):
            _join(self._copying)
            self._copied = step
            self._copying = threading.Thread(
                target=self._copy_beside, args=(shelf, step), name=f"copy-{step}", daemon=True
            )
            self._copying.start()

    def _copy_beside(self, shelf: Shelf, step: int) -> None:
        try:
            with self._timeline.phase("store", step):
                self._copy(shelf, step)
        except BaseException as error:
            self._error = error
        finally:
            self._copied = None

    def _copy(self, shelf: Shelf, step: int) -> None:
        """Publish on the disk what is published in memory: the same bytes, sealed already."""
        source, target = shelf.paths.weight(step), self._assignment.paths.weight(step)
        sealed = durable.read_manifest(source).files
        there = durable.read_committed(target)
        if there is not None and weights.digest(there) == durable.payload_digest(sealed):
            return
        stage = self._assignment.stage
        directory = stage.begin(f"weights_{step}")
        for entry in sealed:
            durable.copy_file(source / entry.name, directory / entry.name)
        manifest = weights.describe(directory, step=step, attempt=self._assignment.attempt, sealed=sealed)
        self._make_room(step, weights.digest(manifest))
        stage.commit(directory, target, manifest)

    def keep(self, steps: Iterable[int]) -> None:
        """See to it that these policies outlive the attempt: a checkpoint that nobody planned needs them.

        Waits for: what was begun. Raises: what it failed of
        """
        self.wait()
        if self._shelf is None:
            return
        for step in steps:
            if weights.is_published(self._shelf.paths, step):
                self._copy(self._shelf, step)

    def prune(self, oldest_served: int, newest: int, ahead: int) -> None:
        """Let go of what no server can need in memory, and no checkpoint that may come now."""
        if self._shelf is not None:
            copied = self._copied
            keep = {*range(newest - ahead, newest + 1), *([] if copied is None else [copied])}
            self._shelf.prune(oldest_served, keep)

    def _make_room(self, step: int, digest: str) -> None:
        """Move aside a policy of this step that has other content, or is damaged."""
        paths = self._assignment.paths
        target = paths.weight(step)
        if not target.exists():
            return
        there = durable.read_committed(target)
        if there is not None and weights.digest(there) == digest:
            return
        aside = paths.superseded / f"{self._assignment.attempt:03d}" / "weights" / target.name
        if aside.exists():  # by an incarnation of this attempt before this one
            aside = paths.superseded / self._assignment.stage.token / "weights" / target.name
        aside.parent.mkdir(parents=True, exist_ok=True)
        self._assignment.stage.move(target, aside)
        self._say(step)

    def _say(self, step: int) -> None:
        if not self._was_said:
            self._was_said = True
            LOGGER.warning(
                "replay is not bitwise here: policy %d differs from the one published before", step
            )


def _join(thread: threading.Thread | None) -> None:
    if thread is not None:
        thread.join()
