"""Saves beside raw writes of the same bytes: `uv run python benchmarks/checkpoint.py --megabytes 2000 --root DIR`.

Synchronous: DCP, hashes, manifest and commit, against one file written and fsynced. Asynchronous: how long the loop
waits, against copying the same bytes in memory once. Both sides alternate; DIR is on the disk to measure.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ratchet import durable
from ratchet.attempts import Assignment, Plan
from ratchet.config import CkptConfig, OptimConfig, SFTConfig
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.timeline import Timeline
from ratchet.trainer.optim import Optimizer
from ratchet.trainer.state import Checkpointer, TrainerState
from ratchet.trainer.world import World, open_world

WIDTH = 2048


class Layers(nn.Module):
    """Some matrices, and what the optimizer asks of a model."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def get_input_embeddings(self) -> None: ...

    get_output_embeddings = get_input_embeddings


def open_checkpointer(root: Path, world: World, *, is_async: bool) -> Checkpointer:
    paths = RunPaths(root)
    for directory in (paths.staging, paths.checkpoint(0).parent, paths.metric("trainer").parent):
        directory.mkdir(parents=True)
    stage = durable.Stage.open(paths, "001.trainer.1")
    config = SFTConfig(
        output_dir=str(root),  # pyright: ignore
        max_steps=100,
        model={"name": "unused"},  # pyright: ignore
        data={"name": "unused"},  # pyright: ignore
        ckpt=CkptConfig(save_async=is_async),
    )
    assignment = Assignment(paths, config, Plan(), 1, "benchmark", 0, stage)
    return Checkpointer(assignment, world, Timeline(None), on_commit=lambda step: None)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def write_raw(path: Path, data: torch.Tensor) -> None:
    with path.open("wb") as file:
        file.write(memoryview(data.numpy()))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--root", type=Path)
    arguments = parser.parse_args()
    world = open_world("cpu")
    model = Layers(max(1, round(arguments.megabytes * 1e6 / (12 * WIDTH**2))))
    state = TrainerState(model, Optimizer(model, OptimConfig()), Progress())  # pyright: ignore
    size = sum(tensor.nbytes for part in state.tensors().values() for tensor in part.values())
    data = torch.randint(0, 255, (size,), dtype=torch.uint8)
    copy = torch.empty_like(data).copy_(data)
    sync, raw, stall, memory = [], [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.root) as directory:
        root = Path(directory)
        plain, background = (
            open_checkpointer(root / name, world, is_async=name == "async") for name in ("sync", "async")
        )
        for step in range(1, arguments.repeats + 1):
            state.progress = Progress(step=step)
            raw.append(seconds(lambda: write_raw(root / "raw", data)))
            sync.append(seconds(lambda: plain.save(state)))
            memory.append(seconds(lambda: copy.copy_(data)))
            stall.append(seconds(lambda: background.save(state)))
            background.close()
            for one in ("sync", "async"):
                for path in (root / one / "checkpoints").glob(f"step_{step}/**/*.distcp"):
                    path.unlink()
    pairs = (
        ("synchronous save / raw write + fsync", sync, raw, 1.2),
        ("asynchronous stall / copy", stall, memory, 1.2),
    )
    sys.stdout.write(f"{size / 1e9:.2f} GB, {arguments.repeats} pairs\n")
    for name, ours, limit, goal in pairs:
        ratio = statistics.median(a / b for a, b in zip(ours, limit, strict=True))
        middle, floor = statistics.median(ours), statistics.median(limit)
        sys.stdout.write(f"{name:40} {middle:.3f} s / {floor:.3f} s = {ratio:.2f} (goal {goal})\n")


if __name__ == "__main__":
    main()
