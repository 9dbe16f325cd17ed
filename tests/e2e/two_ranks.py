"""Started by torchrun: continue the copy of a one-rank run from its checkpoint 2 to its end, on two ranks."""

import os
import shutil
import sys
from pathlib import Path

import msgspec
import torch.distributed as dist

from ratchet import attempts
from ratchet.attempts import Plan
from ratchet.durable import Stage
from ratchet.paths import RunPaths
from ratchet.trainer.loop import Trainer
from ratchet.trainer.world import open_world, set_determinism


def prepare(straight, root):
    """An attempt that starts at checkpoint 2, as the launcher would leave it."""
    paths = RunPaths(root)
    shutil.copytree(straight, root, dirs_exist_ok=True)
    for name in ("checkpoints/step_4", "checkpoints/step_6", "weights/step_4", "weights/step_6"):
        shutil.rmtree(root / name)
    stage = Stage.open(paths, attempts.token(2, "launcher", 0))
    record = attempts.read(paths, 1)
    shutil.copytree(paths.attempt(1), paths.attempt(2))
    plan = Plan(step=2, from_checkpoint=True)
    attempts.write(stage, msgspec.structs.replace(record, attempt=2, plan=plan, outcome=None))
    Stage.open(paths, attempts.token(2, "trainer", 1))


def main():
    straight, root = map(Path, sys.argv[1:])
    rank = int(os.environ["RANK"])
    if rank == 0:
        prepare(straight, root)
    set_determinism(1)
    world = open_world("cpu")
    dist.barrier()
    assignment = attempts.join(root, 2, "trainer", 1)
    Trainer(assignment, world, lambda: False).run()
    dist.barrier()


main()
