"""`ratchet`: what people type to begin runs and to look at them. Needs no torch, so every command answers at once.

A command is one entry of COMMANDS: what it is for, its arguments, and the function that carries it out.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from ratchet import log, process
from ratchet.cli import doctor, init, looking


class Command(NamedTuple):
    """One subcommand."""

    text: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: dict[str, Command] = {
    "init": Command("write a small project of your own that runs as it is", init.arguments, init.run),
    "doctor": Command("say what will not work on this machine, and why", doctor.arguments, doctor.run),
    "watch": Command("the live screen of a run, going on or ended", looking.watch_arguments, looking.watch),
    "status": Command("where a run stands, in lines or as JSON", looking.status_arguments, looking.status),
    "report": Command(
        "write a run, or a comparison, as one HTML page", looking.report_arguments, looking.report
    ),
}


def main() -> None:
    """Entry point of the `ratchet` command."""
    process.run(_main)


def _main() -> int:
    log.setup("ratchet")
    arguments = parser().parse_args()
    return COMMANDS[arguments.command].run(arguments)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="ratchet", description="Begin runs and look at them. `ckpt` proves and copies them."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        inner = commands.add_parser(
            name, help=command.text, description=command.text[0].upper() + command.text[1:] + "."
        )
        command.arguments(inner)
    return root
