"""`ratchet doctor`: what will not work on this machine, and why; put it before the command that you mean to run.

ratchet doctor                          the machine, and the working directory
ratchet doctor outputs/run              the same for a run: its directory, its settings
ratchet doctor rl @ rl.toml             the same for a command, with what its start would refuse
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from ratchet import attempts, config_io
from ratchet.cli import programs
from ratchet.config import RLConfig, RunConfig, SFTConfig
from ratchet.errors import EXIT_CRASH, EXIT_OK, Refusal
from ratchet.inputs.seen import Seen
from ratchet.inputs.tree import Inputs
from ratchet.launch import machine, trials
from ratchet.launch.finding import Finding, of_refusal
from ratchet.paths import RunPaths

_CLASSES: dict[str, type[RunConfig]] = {"sft": SFTConfig, "rl": RLConfig, "trainer": RLConfig}
_STYLES = {"ok": "green", "warning": "yellow", "fails": "bold red"}
_PATIENCE_S = 2.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--output-dir", type=Path, help="look at the file system of this directory")
    parser.add_argument("what", nargs="?", metavar="RUN | sft | rl", help="a run directory, or a command")
    parser.add_argument("settings", nargs=argparse.REMAINDER, help="of the command, as it takes them")


def run(arguments: argparse.Namespace) -> int:
    config, directory, is_planned = _subject(arguments.what, arguments.settings)
    findings = list(_examine(config, arguments.output_dir or directory, is_planned))
    works = all(finding.verdict != "fails" for finding in findings)
    if arguments.json:
        sys.stdout.write(msgspec.json.encode({"works": works, "findings": findings}).decode() + "\n")
    else:
        _say(findings)
    return EXIT_OK if works else EXIT_CRASH


def _subject(what: str | None, settings: list[str]) -> tuple[RunConfig | None, Path, bool]:
    """The settings, the run directory, and whether it is a command that is meant. Raises: Refusal."""
    if what is None:
        return None, Path(), False
    if what in _CLASSES:
        config = config_io.load(_CLASSES[what], settings)
        return config, config.output_dir, True
    if settings or what.startswith("@"):
        raise Refusal(
            "Usage: ratchet doctor [--json] [--output-dir DIR] [RUN | sft @ FILE ... | rl @ FILE ...]"
        )
    paths = RunPaths(Path(what))
    last = attempts.newest(paths)
    return attempts.read_config(paths, last) if last else None, paths.root, False


def _examine(config: RunConfig | None, directory: Path, is_planned: bool) -> Iterator[Finding]:
    yield machine.python()
    yield machine.packages()
    if (slow := machine.byte_code()) is not None:
        yield slow
    found = machine.probe(config)
    yield machine.devices(found, config)
    yield machine.port()
    yield from trials.examine(directory)
    yield machine.disk(found, config, directory)
    more = [
        machine.memory(found, config),
        machine.leftovers(config),
        machine.model(config) if config else None,
    ]
    yield from (finding for finding in more if finding)
    if config is not None and is_planned and not any(finding and finding.name == "model" for finding in more):
        yield _start(config)


def _start(config: RunConfig) -> Finding:
    """What the start itself checks: model, data, environments, reward function, server."""
    try:
        _check_of(config)()
    except Refusal as error:
        return of_refusal("settings", error)
    return Finding("settings", "ok", "model, data and environments fit together")


def _check_of(config: RunConfig) -> Callable[[], object]:
    if isinstance(config, SFTConfig):
        return lambda: programs.check_sft(config, Seen(Inputs()))
    assert isinstance(config, RLConfig)
    client = config.orchestrator.client
    quick = client.model_copy(update={"wait_s": min(client.wait_s, _PATIENCE_S)})
    orchestrator = config.orchestrator.model_copy(update={"client": quick})
    return lambda: programs.check_rl(config.model_copy(update={"orchestrator": orchestrator}), Seen(Inputs()))


def _say(findings: Iterable[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.verdict:<9}", _STYLES[finding.verdict]), f"{finding.name:<11}{finding.text}"
        )
        console.print(line.append(f"; {finding.remedy}") if finding.remedy else line)
