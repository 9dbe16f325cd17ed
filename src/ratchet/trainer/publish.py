"""Publish the policy after `step` updates as weights/step_{step}.

    main thread      gather to host memory ─► next step
    publish thread   write ─► hash ─► commit ─► what older policies held may go

Policies are published one after the other: each waits for the one before it.
"""

import threading
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ratchet import durable, weights
from ratchet.attempts import Assignment
from ratchet.log import LOGGER
from ratchet.models import adapters, build
from ratchet.models.tensors import full_tensors
from ratchet.timeline import Timeline
from ratchet.trainer.world import World


class Publisher:
    """Writes policies beside the training; the same content under the same name is a no-op."""

    def __init__(self, assignment: Assignment, world: World, timeline: Timeline) -> None:
        self._assignment = assignment
        self._world = world
        self._timeline = timeline
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._was_said = False

    def publish(
        self, model: PreTrainedModel, step: int, on_commit: Callable[[], None] = lambda: None
    ) -> None:
        """Begin to publish; `on_commit` runs in the thread that does it. Every rank calls this: shards are gathered.

        Waits for: the policy before this one.
        Raises: what that one failed of.
        """
        with self._timeline.phase("gather", step):
            self.wait()
            tensors = self._gather(model)
        if not self._world.is_first:
            return
        self._thread = threading.Thread(
            target=self._run, args=(tensors, step, on_commit), name=f"publish-{step}", daemon=True
        )
        self._thread.start()

    def _gather(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        tensors = full_tensors(model, is_kept=self._world.is_first)
        lora = self._assignment.config.model.lora
        return tensors if lora is None or not self._world.is_first else adapters.merged(tensors, lora)

    def poll(self) -> None:
        """Raise what publishing has failed of, if it has, without waiting for it."""
        error = self._error
        if error is not None:
            self._error = None
            raise error

    def wait(self) -> None:
        """Wait until what was begun is published. Raises: what it failed of"""
        self.settle()
        self.poll()

    def settle(self) -> None:
        """Let what was begun end, before a crash that has nothing to do with it ends the process."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, tensors: dict[str, torch.Tensor], step: int, on_commit: Callable[[], None]) -> None:
        try:
            with self._timeline.phase("publish", step):
                self._write(tensors, step)
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
        if not self._was_said:
            self._was_said = True
            LOGGER.warning(
                "replay is not bitwise here: policy %d differs from the one published before", step
            )
