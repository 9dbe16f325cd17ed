"""The orchestrator on another machine: join the attempt that a trainer opened, leave when it closes."""

import os
import secrets
import signal
import subprocess
import sys
import time

from ratchet import attempts
from ratchet.attempts import Record
from ratchet.config import RLConfig
from ratchet.errors import EXIT_FENCED, EXIT_OK, EXIT_STOPPED, Damaged, Refusal
from ratchet.launch.early import child_environment
from ratchet.log import LOGGER
from ratchet.paths import RunPaths
from ratchet.stage import Stage

POLL_S = 0.2


def join_orchestrator(config: RLConfig) -> int:
    """Run an orchestrator for the open attempt of `config.output_dir`; exit 75 when the attempt closes.

    Raises: Refusal if no attempt opens within `client.wait_s`.
    """
    paths = RunPaths(config.output_dir)
    record = _wait_for_attempt(paths, config.orchestrator.client.wait_s)
    incarnation = take_over(paths, record, "orchestrator")
    LOGGER.info("joining attempt %d of %s", record.attempt, paths.root)
    command = [
        sys.executable,
        "-m",
        "ratchet.orchestrator",
        str(paths.root),
        str(record.attempt),
        str(incarnation),
    ]
    child = subprocess.Popen(
        [*command, "--base-url", *config.orchestrator.client.base_url],
        env=child_environment(threads=1),
        start_new_session=True,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: child.terminate())
    return _watch(paths, record, child)


def newest(paths: RunPaths) -> Record | None:
    """The newest attempt's record; None while there is none, or it is being replaced under us."""
    try:
        return attempts.newest(paths)
    except Damaged:
        return None


def _open(paths: RunPaths) -> Record | None:
    record = newest(paths)
    return record if record is not None and record.applied and record.outcome is None else None


def _wait_for_attempt(paths: RunPaths, wait_s: float) -> Record:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if (record := _open(paths)) is not None:
            return record
        time.sleep(POLL_S)
    raise Refusal(
        f"No attempt is open in {paths.root} after {wait_s:g} s: start `uv run trainer` with the same files first."
    )


def take_over(paths: RunPaths, record: Record, role: str) -> int:
    """Fence an older program of a role of this attempt; returns the incarnation of the new one.

    Workshops are made by way of the launcher's: one that is late finds the attempt closed. Raises: Fenced
    """
    launcher = Stage(paths, attempts.token(record.attempt, "launcher", 0))
    prefix = attempts.token(record.attempt, role, 0)[:-1]
    known = [int(n.rpartition(".")[2]) for n in os.listdir(paths.staging) if n.startswith(prefix)]
    incarnation = max(known, default=0) + 1
    stage = launcher.open_for(attempts.token(record.attempt, "joining", secrets.randbits(60)))
    stage.revoke(prefix)
    launcher.open_for(attempts.token(record.attempt, role, incarnation))
    stage.leave()
    return incarnation


def _watch(paths: RunPaths, record: Record, child: "subprocess.Popen[bytes]") -> int:
    while child.poll() is None:
        current = attempts.newest(paths)
        if current is None:
            break  # the run directory is gone: the child says so, and ends
        ended = current.attempt != record.attempt or current.outcome is not None
        if ended and not (current.outcome and current.outcome.code == EXIT_OK):
            child.terminate()
            child.wait()
            return EXIT_STOPPED
        time.sleep(POLL_S)
    code = child.wait()
    has_closed = code == EXIT_FENCED and _open(paths) is None
    return EXIT_STOPPED if has_closed else code
