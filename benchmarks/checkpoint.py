"""A checkpoint of 2 GB beside the same bytes written plainly: `python benchmarks/checkpoint.py --root DIR [DIR ...]`.

163 million parameters with AdamW on a CPU or one GPU; each DIR lies on a file system to measure, on the first the
asynchronous rows too. Sides alternate in one run, in changing order; a ratio is the median over pairs. The limit is the
other side. Under four minutes for a disk and memory on two CPU cores with nothing beside it.

    sync    a whole save: DCP, hashes, fsync, commit    raw write + fsync of the same bytes, in pieces of 256 KB:
                                                        whole tensors at once are several times slower on ext4
    async   how long the loop waits                     one copy of the state in memory
            steps while the save writes                 steps before it
"""

import argparse
import json
import os
import platform
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
from ratchet.models.device import choose
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
TOKENS = 32
"""So few that a step is short beside a save."""
REPEATS = 5
PIECE_BYTES = 256 << 10
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
        ids = np.random.default_rng(0).integers(3, 60, TOKENS + 1).tolist()
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
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            rest = tensor.cpu().contiguous().view(-1).numpy().data.cast("B")
            while rest:
                rest = rest[file.write(rest[:PIECE_BYTES]) :]
        os.fsync(file.fileno())


def measure_sync(root: Path, threads: int) -> None:
    training = Training(root, is_async=False, threads=threads)
    training.step()
    tensors, plain_file = training.tensors, root / "plain"
    sides = {"save": training.save, "plain": lambda: raw_write(tensors, plain_file)}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name in sorted(sides, reverse=repeat % 2 == 0):
            began = time.process_time()
            taken[name].append(timed(sides[name]))
            cpu[name].append(time.process_time() - began)
            if name == "save":
                training.forget()
            else:
                plain_file.unlink()
    ours, plain = taken["save"][1:], taken["plain"][1:]  # the first pair finds memory that was never used
    ratio = statistics.median(o / p for o, p in zip(ours, plain, strict=True))
    say("state", f"{sum(tensor.nbytes for tensor in tensors) / 1e9:.2f} GB")
    say("sync: save / raw write + fsync", f"{ratio:.2f}x (limit 1, goal 1.2, gap {ratio - 1:+.2f})")
    say("  medians", f"{statistics.median(ours):.2f} s, {statistics.median(plain):.2f} s")
    say("  pairs", ", ".join(f"{o:.2f} {p:.2f}" for o, p in zip(ours, plain, strict=True)))
    say("  CPU time", ", ".join(f"{statistics.median(cpu[name][1:]):.2f} s" for name in ("save", "plain")))


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
    stalls, copies, slowdowns, extras = [], [], [], []
    usual = 0.0
    for _ in range(REPEATS):
        usual = statistics.median(timed(training.step) for _ in range(3))
        copies.append(timed(copy))
        stalls.append(timed(training.save))
        busy = []
        while training.saver.saving is not None:
            busy.append(timed(training.step))
        training.forget()
        slowdowns += [step / usual for step in busy]
        extras.append(sum(step - usual for step in busy))
    ratio = statistics.median(s / c for s, c in zip(stalls, copies, strict=True))
    stall, extra = statistics.median(stalls), statistics.median(extras)
    overhead, limit = (stall + extra) / A_MINUTE, statistics.median(copies) / A_MINUTE
    say(
        "async: the loop waits / one copy in memory",
        f"{ratio:.2f}x (limit 1, goal 1.2, gap {ratio - 1:+.2f})",
    )
    say("  medians", f"{stall:.2f} s, {statistics.median(copies):.2f} s")
    say(
        f"  {len(slowdowns)} steps while a save writes",
        f"{statistics.median(slowdowns):.2f}x of {usual:.2f} s",
    )
    say("  what they take longer, of one save", ", ".join(f"{e:.2f}" for e in extras) + " s")
    say(
        "overhead at one save a minute",
        f"{overhead:.1%} (limit {limit:.1%}, goal 3 %, gap {overhead - limit:.1%})",
    )


def say(what: str, figure: str) -> None:
    sys.stdout.write(f"{what:48} {figure}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, nargs="+", default=[Path("outputs")])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    set_determinism(arguments.threads)
    WORLD = open_world(choose("auto"))
    say(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {arguments.threads} used",
        f"torch {torch.__version__}",
    )
    for measure, root in [(measure_sync, r) for r in arguments.root] + [(measure_async, arguments.root[0])]:
        root.mkdir(parents=True, exist_ok=True)
        say(f"below {root}", f"load {os.getloadavg()[0]:.1f}")
        with tempfile.TemporaryDirectory(dir=root) as directory:
            measure(Path(directory), arguments.threads)
