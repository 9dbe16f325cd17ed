"""Start the programs of an attempt, watch them, pass signals on; the first failure stops all.

Who may end first: a trainer that reached max_steps (the orchestrator still plays the last evaluation), or an
orchestrator that has emitted the last batch. Inference never; it is stopped last.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED
from ratchet.launch.opening import Attempt
from ratchet.report.console import Console

POLL_S = 0.05
GRACE_S = 20.0
LAST_LINES = 15


@dataclass
class Child:
    """One program of the run."""

    role: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


@dataclass
class Supervisor:
    """Starts, watches and stops the children of one attempt."""

    attempt: Attempt
    console: Console
    children: dict[str, Child] = field(default_factory=dict)
    stop_requests: int = 0

    def start(self, role: str, *arguments: str, threads: int = 1, fds: tuple[int, ...] = ()) -> None:
        """Start `python -m ratchet.<role> RUN ATTEMPT INCARNATION`; its output goes to the attempt's log."""
        number = self.attempt.record.attempt
        log = self.attempt.paths.attempt(number) / f"{role}.log"
        command = [sys.executable, "-m", f"ratchet.{role}", str(self.attempt.paths.root), str(number), "1"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(threads),
                pass_fds=fds,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which decides
            )
        self.children[role] = Child(role, process, log)

    def install_signal_handlers(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_requests += 1

    def run(self) -> tuple[int, str]:
        """Watch until every program has done its work; returns the exit code and the reason."""
        asked = False
        while True:
            self.console.refresh()
            if self.stop_requests > 1:
                self.kill()
                return EXIT_STOPPED, "stopped at once by a second signal"
            if self.stop_requests and not asked:
                self.console.say("Stopping after this step; once more to stop at once.")
                self.signal("trainer", signal.SIGTERM)
                asked = True
            codes = {role: child.process.poll() for role, child in self.children.items()}
            if (verdict := self._judge(codes, asked)) is not None:
                self.console.refresh()
                return verdict
            time.sleep(POLL_S)

    def _judge(self, codes: dict[str, int | None], asked: bool) -> tuple[int, str] | None:
        """What the exit codes so far mean: None while there is work to be done."""
        workers = {role: code for role, code in codes.items() if role != "inference"}
        if asked and codes.get("trainer") in (EXIT_OK, EXIT_STOPPED):
            self.stop_all()
            return EXIT_STOPPED, "stopped on request"
        for role, code in codes.items():
            if code is not None and (code != EXIT_OK or role == "inference"):
                self.stop_all()
                return self._failure(role, code or EXIT_CRASH)
        if all(code == EXIT_OK for code in workers.values()):
            self.stop_all()
            return EXIT_OK, "complete"
        return None

    def _failure(self, role: str, code: int) -> tuple[int, str]:
        child = self.children[role]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        reason = f"{role} {how}"
        self.console.say(f"The {reason}; its last lines ({child.log}):\n{child.tail()}")
        return code if code > 0 else EXIT_CRASH, reason

    def signal(self, role: str, number: int) -> None:
        child = self.children.get(role)
        if child is not None and child.process.poll() is None:
            child.process.send_signal(number)

    def stop_all(self) -> None:
        """Ask everyone, the trainer first because it may save; insist after the grace period."""
        for role in ("trainer", "orchestrator", "inference"):
            self.signal(role, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(c.process.poll() is None for c in self.children.values()):
            self.console.refresh()
            time.sleep(POLL_S)
        self.kill()

    def kill(self) -> None:
        for child in self.children.values():
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


def child_environment(threads: int) -> dict[str, str]:
    """Fixed thread counts, and who the parent is (see `process.die_with_parent`)."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {name: str(threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "RATCHET_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
