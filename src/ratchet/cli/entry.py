"""Where `sft`, `rl` and `trainer` begin: their nursery imports torch while they import and check the rest.

So nothing that takes time may be imported here before the nursery has begun.
"""

from typing import NoReturn

from ratchet.launch import early


def sft() -> NoReturn:
    """Supervised fine-tuning."""
    begun = early.begin_for(["trainer"])
    from ratchet.cli import programs

    programs.sft(begun)


def rl() -> NoReturn:
    """Asynchronous RL."""
    begun = early.begin_for(["trainer", "inference"])
    from ratchet.cli import programs

    programs.rl(begun)


def trainer() -> NoReturn:
    """The trainer of an RL run alone, or a replay."""
    begun = early.begin_for(["trainer"])
    from ratchet.cli import programs

    programs.trainer(begun)
