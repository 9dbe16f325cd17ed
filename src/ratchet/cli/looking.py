"""`ratchet watch`, `status` and `report`: three ways to look at a run directory."""

import argparse
import sys
import time
from pathlib import Path

from ratchet.cli.ckpt.output import check_run, say
from ratchet.errors import EXIT_OK, Refusal
from ratchet.report.console import DRAW_S, Screen, open_terminal
from ratchet.report.screen import screen
from ratchet.report.status import lines
from ratchet.report.status import status as describe
from ratchet.report.view import View, Watcher


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")


def watch(arguments: argparse.Namespace) -> int:
    """Draw until the run ends or Ctrl-C; once, where the output is not a terminal."""
    paths, console = check_run(arguments.run), open_terminal(sys.stdout)
    if not console.is_terminal:
        console.print(screen(_look(arguments.run), console.width))
        return EXIT_OK
    try:
        with Screen(Watcher(paths), console) as live:
            while live.draw():
                time.sleep(DRAW_S)
    except KeyboardInterrupt:
        pass  # the run goes on
    return EXIT_OK


def status_arguments(parser: argparse.ArgumentParser) -> None:
    watch_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def status(arguments: argparse.Namespace) -> int:
    view = _look(arguments.run)
    say(describe(view), lines(view), as_json=arguments.json)
    return EXIT_OK


def _look(root: Path) -> View:
    view = Watcher(check_run(root)).look()
    if view is None:
        raise Refusal(f"{root} holds no run: no attempt was recorded in it.")
    return view


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="several are compared")
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default report.html in the first run")


def report(arguments: argparse.Namespace) -> int:
    from ratchet.report import page

    runs = [check_run(root) for root in arguments.runs]
    default = "report.html" if len(runs) == 1 else "comparison.html"
    target = arguments.out or arguments.runs[0] / default
    page.write(target, runs)
    sys.stdout.write(f"{target}\n")
    return EXIT_OK
