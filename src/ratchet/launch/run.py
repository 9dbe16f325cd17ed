"""One attempt of `sft` or `rl`, from the plan to the closing summary."""

import socket
import sys
from collections.abc import Callable
from typing import IO

from ratchet import metrics
from ratchet.attempts import Plan
from ratchet.config import RLConfig, RunConfig, SFTConfig
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED
from ratchet.launch.opening import Attempt, open_attempt
from ratchet.launch.preflight import disk_warning
from ratchet.launch.supervisor import Supervisor
from ratchet.report.console import Console


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that a child inherits: no other process can take the port in between."""
    server = socket.create_server((host, port))
    server.set_inheritable(True)
    return server


def run(kind: str, config: RunConfig, roles: tuple[str, ...], check: Callable[[], None]) -> int:
    """Run one attempt of `sft` or `rl` to its exit code."""
    opened = open_attempt(kind, config, check)
    if isinstance(opened, Plan):
        for message in opened.messages:
            sys.stderr.write(f"{message}\n")
        return EXIT_OK
    log = (opened.paths.attempt(opened.record.attempt) / "launcher.log").open("a")
    console = Console(opened.paths, kind, config.max_steps, log)
    _greet(console, opened)
    supervisor = Supervisor(opened, console)
    supervisor.install_signal_handlers()
    try:
        with console:
            _start_children(supervisor, config, roles)
            code, reason = supervisor.run()
    except BaseException as error:
        supervisor.kill()
        opened.close(EXIT_CRASH, f"launcher: {error!r}")
        raise
    opened.close(code, reason)
    _say_goodbye(console, opened, code, log)
    return code


def _greet(console: Console, opened: Attempt) -> None:
    record = opened.record
    for message in record.plan.messages or ("Starting at step 0.",):
        console.say(f"Attempt {record.attempt} in {opened.paths.root}: {message}")
    for change in record.announced:
        console.say(f"Changed: {change}")
    if warning := disk_warning(opened.config):
        console.say(f"Warning: {warning}")


def _start_children(supervisor: Supervisor, config: RunConfig, roles: tuple[str, ...]) -> None:
    if isinstance(config, SFTConfig | RLConfig):
        supervisor.start("trainer", threads=config.trainer.threads)
    if not isinstance(config, RLConfig):
        return
    url = config.orchestrator.client.base_url
    if "inference" in roles and config.inference is not None:
        with listen(config.inference.host, 0) as server:
            fd = server.fileno()
            supervisor.start("inference", "--fd", str(fd), threads=config.inference.threads, fds=(fd,))
            host, port = server.getsockname()[:2]
            url = f"http://{host}:{port}"
    if "orchestrator" in roles:
        supervisor.start("orchestrator", "--base-url", url)


def _say_goodbye(console: Console, opened: Attempt, code: int, log: IO[str]) -> None:
    if code == EXIT_OK:
        console.summarize()
    elif code == EXIT_STOPPED:
        rows = metrics.read(opened.paths.metric("trainer"))
        step = rows[-1]["step"] if rows else opened.record.plan.step
        console.say(f"Stopped after step {step}. The same command continues.")
    log.close()
