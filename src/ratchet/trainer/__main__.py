"""`python -m ratchet.trainer RUN ATTEMPT INCARNATION`: the trainer of an attempt, started by the launcher."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from ratchet import attempts, heartbeat, log, process
from ratchet.errors import EXIT_OK, Stopped

_asked: list[int] = []


def _on_signal(number: int, frame: FrameType | None) -> None:
    _asked.append(number)


def main() -> int:
    """Train to `max_steps`; the first signal stops at the next step boundary."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    root, attempt, incarnation = sys.argv[1:4]
    rank = int(os.environ.get("RANK", "0"))
    assignment = attempts.join(Path(root), int(attempt), "trainer", int(incarnation))
    log.setup("trainer" if rank == 0 else f"trainer.{rank}", assignment.config.log.level)
    with process.imports():
        from ratchet.models import device
        from ratchet.trainer.loop import Trainer
        from ratchet.trainer.world import open_world, set_determinism

    heartbeat.start(assignment.stage, rank)
    trainer = assignment.config.trainer
    set_determinism(trainer.threads)
    chosen = device.choose_for(assignment, "trainer", trainer.device)
    world = open_world(chosen, trainer.parallel.replicate)
    if world.is_first:
        device.note(assignment, "trainer", world.device)
    try:
        Trainer(assignment, world, lambda: bool(_asked)).run()
    except Stopped:
        world.part()
        raise
    world.part()
    return EXIT_OK


if __name__ == "__main__":
    process.die_with_parent()
    process.run(main)
