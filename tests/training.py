"""The trainer's parts in this process: a model of the example, batches of random tokens, checkpoints in a directory."""

import numpy as np

from ratchet.attempts import Assignment, Plan
from ratchet.config import SFTConfig
from ratchet.models.trainable import build_trainable
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.stage import Stage
from ratchet.timeline import Timeline
from ratchet.trainer import rows
from ratchet.trainer.packing import Example
from ratchet.trainer.source import Batch
from ratchet.trainer.state import Checkpointer, TrainerState
from ratchet.trainer.update import open_updater

MODEL = {"name": "examples/reverse_text/model", "random_init": True, "attention": "eager"}

SMOOTH = {"lr": 1.0, "eps": 1.0}
"""AdamW whose steps are those of the gradient, for what may differ by rounding. With an `eps` far below the gradients
its first steps are `lr` times their signs, and a gradient near zero has either sign: which, the processor decides.
"""
ROUNDING = 3e-6
"""After a few smooth steps in fp32: sums of some hundred terms, all below the clipped norm of 1, keep five digits."""


def settings(*, model=None, **trainer):
    """SFT of the example's model with AdamW in fp32, unless stated otherwise."""
    return SFTConfig.model_validate(
        {
            "model": MODEL | (model or {}),
            "max_steps": 9,
            "data": {"name": "x"},
            "ckpt": {},
            "trainer": {"precision": "fp32", "optim": {"lr": 1e-2}, "device": "cpu"} | trainer,
        }
    )


def batch(step):
    """Eight samples of 4 to 24 random tokens: a function of the step."""
    draw = np.random.default_rng(step)
    lengths = draw.integers(4, 25, size=8)
    return Batch([Example(draw.integers(3, 60, n).tolist(), [False, *[True] * (n - 1)]) for n in lengths])


class Run:
    """A trainer without a launcher: what it publishes lies below `root`."""

    def __init__(self, root, world, config, attempt=1):
        self.config = config
        self.paths = RunPaths(root)
        for directory in (self.paths.staging, self.paths.checkpoints, self.paths.metrics):
            directory.mkdir(parents=True, exist_ok=True)
        self.paths.metric("trainer").touch()
        stage = Stage.open(self.paths, f"{attempt:03d}.trainer.1")
        self.model, base = build_trainable(config.model, seed=config.seed)
        self.updater = open_updater(self.model, config, world)
        self.state = TrainerState(self.model, self.updater.optimizer, Progress(), base)
        assignment = Assignment(
            paths=self.paths, config=config, plan=Plan(), attempt=attempt, run_id="x", lineage=0, stage=stage
        )
        self.checkpointer = Checkpointer(assignment, world, Timeline(None), on_commit=lambda step: None)

    def train(self, steps):
        """So many updates more; returns the figures of the last."""
        figures = {}
        for _ in range(steps):
            step = self.state.progress.step
            figures = self.updater.update(batch(step), step, 1.0)
            rows.advance(self.state.progress, batch(step))
        return figures

    def save(self):
        self.checkpointer.save(self.state)
        return self.paths.checkpoint(self.state.progress.step)

    def restore(self, step):
        self.checkpointer.restore(self.state, step)

    def tensors(self):
        """Model and optimizer, whole: every tensor that exists, also those that no checkpoint holds."""
        own = {f"model.{name}": p for name, p in self.model.named_parameters()}
        own |= {f"optimizer.{name}": t for name, t in self.updater.optimizer.tensors().items()}
        return {name: _whole(tensor).clone() for name, tensor in own.items()}


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
