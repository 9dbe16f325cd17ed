"""`ckpt`: look at a run, prove it, copy from it. Only `diff` and `export` need torch, the rest answers at once.

Exit codes: 0 fine; 1 `audit` or `diff` found something; 2 a refusal, and damage that `verify` found.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from ratchet import process
from ratchet.cli.ckpt import comparing, copying, listing
from ratchet.cli.ckpt.output import check_run

Command = Callable[[argparse.Namespace], int]

COMMANDS: dict[str, tuple[str, Command]] = {
    "ls": ("list the checkpoints of a run, why each is kept, and what was moved aside", listing.ls),
    "show": ("one checkpoint: counters, learning rate, parts, versions", listing.show),
    "verify": (
        "read every byte of every checkpoint, batch, policy and evaluation and compare it with its manifest",
        listing.verify,
    ),
    "digest": ("one digest of everything that must be equal in two equal runs", listing.digests),
    "audit": ("prove that every draw was trained once, dropped once or is in flight", comparing.audits),
    "diff": ("what differs between two checkpoints, each RUN or RUN@STEP", comparing.diff),
    "plan": ("what continuing would do and discard; touches nothing", comparing.plan),
    "export": (
        "write the model of a checkpoint as a Hugging Face directory; of a LoRA run its adapters",
        copying.export,
    ),
    "fork": ("a new run directory that begins at a checkpoint, by hard links", copying.forks),
}


def main() -> None:
    """Entry point of the `ckpt` command."""
    process.run(_main)


def _main() -> int:
    arguments = _parser().parse_args()
    if arguments.command != "diff":
        check_run(arguments.run)
    return COMMANDS[arguments.command][1](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ckpt", description="Look at the checkpoints of a run, prove it, copy from it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, _) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == "diff":
            command.add_argument("a", metavar="A", help="RUN or RUN@STEP; RUN means its newest checkpoint")
            command.add_argument("b", metavar="B", help="the same")
        else:
            command.add_argument("run", type=Path, metavar="RUN", help="the run directory")
        if name in ("show", "export", "fork"):
            command.add_argument("step", type=int, metavar="STEP")
        if name in ("export", "fork"):
            command.add_argument("target", type=Path, metavar="DIR" if name == "export" else "NEW")
        if name == "export":
            command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
            command.add_argument(
                "--merge", action="store_true", help="LoRA: the whole model, not the adapters"
            )
        if name == "plan":
            command.add_argument("--max-steps", type=int)
            command.add_argument("--resume-step", type=int, help="-1 means the newest")
        command.add_argument("--json", action="store_true", help="for programs")
    return parser
