"""`ratchet init`: a project that runs as it is, on a CPU and without a network; what is yours to change is one file."""

import argparse
import shutil
import sys
from pathlib import Path

from ratchet import durable

TEMPLATE = Path(__file__).parents[1] / "templates" / "project"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a name that is free")


def run(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    write(directory)
    sys.stdout.write(
        f"{directory} is written: reward.py says what an answer is worth, README.md what the other files are for.\n"
        f"  cd {directory}\n"
        "  uv run rl @ rl.toml\n"
    )
    return 0


def write(directory: Path) -> None:
    """Copy the template. Raises: Refusal if the name is taken."""
    with durable.new_directory(directory) as staged:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(TEMPLATE, staged, ignore=ignored, dirs_exist_ok=True)
