"""What sharing a task's prompt among its rollouts saves in training: `uv run python benchmarks/shared_prompts.py`.

Sixteen tasks of sixteen rollouts, on the example's model (CPU) or one of the Qwen3-0.6B shape (GPU). Both ways
alternate in one run; each is also asked whether two passes over one batch give the same bits. `limit` is how many times
fewer tokens there are: more can only come from attention.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gpu import TINY, Way, settings, write_model

from ratchet.models.build import build
from ratchet.models.device import choose
from ratchet.trainer.packing import Example, micro_batches
from ratchet.trainer.source import Batch
from ratchet.trainer.update import Updater, open_updater
from ratchet.trainer.world import World, open_world, set_determinism

GROUPS, ROLLOUTS = 16, 16


def rollouts(vocabulary: int, prompt: int, longest: int) -> list[Example]:
    """Completions of 1 to `longest` tokens."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(GROUPS):
        begin = draw.integers(2, vocabulary, prompt).tolist()
        for length in draw.integers(1, longest + 1, ROLLOUTS):
            ids = [*begin, *draw.integers(2, vocabulary, length).tolist()]
            mask = [False] * prompt + [True] * int(length)
            made.append(Example(ids, mask, [-12.0] * len(ids), float(draw.normal())))
    return made


def open_one(model: Path, world: World, budget: int, *, shares: bool) -> Updater:
    config = settings("rl", model, budget, Way("none", "eager"))
    precision = "bf16" if world.device.type == "cuda" else "fp32"
    trainer = config.trainer.model_copy(update={"share_prompts": shares, "precision": precision})
    config = config.model_copy(update={"trainer": trainer})
    return open_updater(build(config.model, seed=0), config, world)


def timed(updater: Updater, batch: Batch) -> float:
    started = time.perf_counter()
    updater.update(batch, 1, 1.0)  # its figures are read back, so the device has finished
    return time.perf_counter() - started


def compare(model: Path, world: World, prompt: int, longest: int, budget: int, repeats: int) -> None:
    examples = rollouts(
        build(settings("rl", model, 1, Way("none", "eager")).model, seed=0).config.vocab_size, prompt, longest
    )
    batch = Batch(examples)
    cells = [
        sum(part.inputs_BT.size for part in micro_batches(examples, budget, 0, 1, shares_prompts=shares))
        for shares in (False, True)
    ]
    both = [open_one(model, world, budget, shares=shares) for shares in (False, True)]
    for updater in both:
        first, second = (updater.update(batch, 0, 0.0) for _ in range(2))
        if first != second:
            raise SystemExit("BITS DO NOT REPEAT")
    times = [[timed(updater, batch) for updater in both] for _ in range(repeats)]
    apart, together = (statistics.median(one) for one in zip(*times, strict=True))
    sys.stdout.write(
        f"prompt {prompt:5}, completions to {longest:4}: apart {apart:.3f} s, shared {together:.3f} s, "
        f"ratio {apart / together:.2f} (limit {cells[0] / cells[1]:.2f}), bits repeat\n"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    set_determinism(1)
    world = open_world(choose("auto"))
    with tempfile.TemporaryDirectory() as directory:
        if world.device.type == "cpu":
            for prompt, longest in ((12, 20), (40, 20), (80, 40)):
                compare(TINY, world, prompt, longest, 2048, repeats)
            return
        model = Path(directory) / "model"
        write_model(model)
        for prompt, longest in ((40, 40), (200, 40), (400, 100)):
            compare(model, world, prompt, longest, 16384, repeats)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
