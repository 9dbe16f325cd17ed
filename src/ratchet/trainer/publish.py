"""Publish the policy after `step` updates as weights/step_{step}."""

from transformers import PreTrainedModel

from ratchet import durable, weights
from ratchet.attempts import Assignment
from ratchet.log import LOGGER
from ratchet.models import adapters, build
from ratchet.models.tensors import full_tensors
from ratchet.trainer.world import World


class Publisher:
    """Writes policies; the same content under the same name is a no-op."""

    def __init__(self, assignment: Assignment, world: World) -> None:
        self._assignment = assignment
        self._world = world
        self._was_said = False

    def publish(self, model: PreTrainedModel, step: int) -> None:
        tensors = full_tensors(model, is_kept=self._world.is_first)
        if not self._world.is_first:
            return
        stage, attempt, config = (
            self._assignment.stage,
            self._assignment.attempt,
            self._assignment.config.model,
        )
        if config.lora is not None:
            tensors = adapters.merged(tensors, config.lora)
        directory = stage.begin(f"weights_{step}")
        build.save(directory, tensors, config)
        self._make_room(step, durable.payload_digest(durable.seal(directory)))
        weights.commit(stage, directory, step=step, attempt=attempt)

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
