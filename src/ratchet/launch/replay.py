"""Train a run again from its batches, in as many processes and with the thread counts of the run."""

import subprocess
import sys
import tempfile
from pathlib import Path

from ratchet import attempts
from ratchet.config import TrainerConfig
from ratchet.errors import Refusal
from ratchet.launch.early import child_environment
from ratchet.launch.program import Ranks, rank_environment
from ratchet.paths import RunPaths


def replay(root: Path) -> int:
    """The exit code of rank 0. Raises: Refusal for a directory without a run, and where the ranks changed."""
    trainer = _trainer_config(RunPaths(root))
    all_here = Ranks(trainer.ranks)
    command = [sys.executable, "-m", "ratchet.trainer.replay", str(root)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                command,
                env=child_environment(trainer.threads, keeps_memory=True)
                | rank_environment(rank, all_here, Path(folder)),
            )
            for rank in all_here.own
        ]
        try:
            return ranks[0].wait()
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def _trainer_config(paths: RunPaths) -> TrainerConfig:
    """The one that every attempt agrees on, as far as processes go."""
    records = [attempts.read(paths, number) for number in attempts.numbers(paths)]
    if not records:
        raise Refusal(f"{paths.root} is not a run directory: it has no attempts/.")
    configs: list[TrainerConfig] = [attempts.read_config(paths, record).trainer for record in records]
    ranks = sorted({config.ranks for config in configs})
    if len(ranks) > 1:
        raise Refusal(
            f"{paths.root} cannot be replayed bit by bit: its attempts trained on {', '.join(map(str, ranks))} "
            "processes (trainer.nproc, trainer.nnodes)."
        )
    copies = sorted({config.parallel.replicate for config in configs})
    if len(copies) > 1:
        raise Refusal(
            f"{paths.root} cannot be replayed bit by bit: its attempts had {', '.join(map(str, copies))} copies of "
            "the model (trainer.parallel.replicate)."
        )
    return configs[-1]
