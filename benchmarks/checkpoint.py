"""A checkpoint of 2 GB beside the same bytes written plainly: `python benchmarks/checkpoint.py --root DIR`.

163 million parameters with AdamW on a CPU or one GPU; DIR lies on the disk to measure. Sides alternate in one run.

    sync    a whole save: DCP, hashes, fsync, commit, read-back    raw write + fsync of the same bytes
    async   how long the loop waits                                one copy of the state in memory
            steps while the save writes                            steps while nothing does
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch

from ratchet.attempts import Assignment, Plan
from ratchet.config import SFTConfig
from ratchet.models.build import build
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.stage import Stage
from ratchet.timeline import Timeline
from ratchet.trainer.packing import Example
from ratchet.trainer.source import Batch
from ratchet.trainer.state import Checkpointer, TrainerState
from ratchet.trainer.update import open_updater
from ratchet.trainer.world import open_world, set_determinism

TINY = Path("examples/reverse_text/model/config.json")
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 16}
SHAPE |= {"head_dim": 64, "intermediate_size": 3072}
REPEATS = 5
A_MINUTE = 60.0


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Training:
    """A trainer without a launcher, whose every step may be saved."""

    def __init__(self, root: Path, *, is_async: bool, threads: int) -> None:
        model = root / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(json.loads(TINY.read_text()) | SHAPE))
        config = SFTConfig.model_validate(
            {
                "model": {"name": str(model), "random_init": True, "attention": "sdpa"},
                "max_steps": 1000,
                "data": {"name": "unused"},
                "ckpt": {"save_async": is_async},
                "trainer": {"precision": "fp32", "threads": threads},
            }
        )
        paths = RunPaths(root / ("async" if is_async else "sync"))
        for directory in (paths.staging, paths.checkpoints, paths.metrics):
            directory.mkdir(parents=True)
        paths.metric("trainer").touch()
        stage = Stage.open(paths, "001.trainer.1")
        world = WORLD
        module = build(config.model, seed=0)
        self.updater = open_updater(module, config, world)
        self.state = TrainerState(module, self.updater.optimizer, Progress())
        assignment = Assignment(
            paths=paths, config=config, plan=Plan(), attempt=1, run_id="x", lineage=0, stage=stage
        )
        self.saver = Checkpointer(assignment, world, Timeline(None), on_commit=lambda step: None)
        self._paths, self._stage = paths, stage
        ids = np.random.default_rng(0).integers(3, 60, 129).tolist()
        self._batch = Batch([Example(ids, [True] * len(ids))])

    def step(self) -> None:
        self.updater.update(self._batch, 0, 1.0)

    def save(self) -> None:
        self.state.progress.step += 1
        self.saver.save(self.state)

    def forget(self) -> None:
        """Delete the checkpoint that was written: the disk should not fill."""
        self.saver.close()
        self._stage.remove(self._paths.checkpoint(self.state.progress.step))

    @property
    def tensors(self) -> list[torch.Tensor]:
        parts = self.state.tensors().values()
        return [tensor.to_local() for tensors in parts for tensor in tensors.values()]


def raw_write(tensors: list[torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(memoryview(tensor.cpu().contiguous().view(-1).numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def measure_sync(root: Path, threads: int) -> None:
    training = Training(root, is_async=False, threads=threads)
    training.step()
    size = sum(tensor.nbytes for tensor in training.tensors)
    ours, plain = [], []
    for _ in range(REPEATS):
        plain.append(timed(lambda: raw_write(training.tensors, root / "plain")))
        ours.append(timed(training.save))
        training.forget()
    ratio = statistics.median(o / p for o, p in zip(ours, plain, strict=True))
    say("state", f"{size / 1e9:.2f} GB")
    say("sync: save / raw write + fsync", f"{ratio:.2f}x (goal 1.2x)")
    say("  medians", f"{statistics.median(ours):.2f} s, {statistics.median(plain):.2f} s")


def measure_async(root: Path, threads: int) -> None:
    training = Training(root, is_async=True, threads=threads)
    buffers = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in training.tensors]

    def copy() -> None:
        for buffer, tensor in zip(buffers, training.tensors, strict=True):
            buffer.copy_(tensor.detach(), non_blocking=True)

    for _ in range(2):  # memory that both sides will use again
        training.step()
        copy()
        training.save()
        training.forget()
    stalls, copies, busy, calm = [], [], [], []
    for _ in range(REPEATS):
        calm += [timed(training.step) for _ in range(3)]
        copies.append(timed(copy))
        started = time.perf_counter()
        stalls.append(timed(training.save))
        while training.saver.saving is not None:
            busy.append((timed(training.step), time.perf_counter() - started))
        training.forget()
    usual = statistics.median(calm)
    extra = sum(step - usual for step, _ in busy) / REPEATS
    ratio = statistics.median(s / c for s, c in zip(stalls, copies, strict=True))
    say("async: the loop waits / one copy in memory", f"{ratio:.2f}x (goal 1.2x)")
    say("  medians", f"{statistics.median(stalls):.2f} s, {statistics.median(copies):.2f} s")
    say("a step while a save writes", f"{statistics.median(s for s, _ in busy):.2f} s, else {usual:.2f} s")
    overhead = (statistics.median(stalls) + extra) / A_MINUTE
    say("overhead at one save a minute", f"{overhead:.1%} (goal 3 %)")


def say(what: str, figure: str) -> None:
    sys.stdout.write(f"{what:48} {figure}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("outputs"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    set_determinism(arguments.threads)
    WORLD = open_world("auto")
    arguments.root.mkdir(parents=True, exist_ok=True)
    for measure in (measure_sync, measure_async):
        with tempfile.TemporaryDirectory(dir=arguments.root) as directory:
            measure(Path(directory), arguments.threads)
