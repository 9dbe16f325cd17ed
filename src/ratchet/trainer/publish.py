"""Publish the policy after `step` updates as weights/step_{step}."""

import torch
from transformers import PreTrainedModel

from ratchet import durable, weights
from ratchet.attempts import Assignment
from ratchet.log import LOGGER
from ratchet.models import build
from ratchet.trainer.world import World


def full_tensors(model: PreTrainedModel, *, is_kept: bool = True) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer, whole and on the CPU; tied ones appear once.

    All ranks call it, because shards are gathered; those that do not keep the result copy nothing to the host.
    """
    own = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    whole: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        if is_kept:
            whole[name] = tensor.detach().cpu()
    return whole


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
        stage, attempt = self._assignment.stage, self._assignment.attempt
        directory = stage.begin(f"weights_{step}")
        build.save(directory, tensors, self._assignment.config.model)
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
