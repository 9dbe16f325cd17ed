"""One incarnation of a role, as the operating system sees it: one process, or the ranks of the trainer.

Ranks live and die together: one that fails ends its incarnation, and the launcher ends the others. They find each
other through a file in their workshop, so those of two incarnations can never meet.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ratchet import attempts, heartbeat
from ratchet.durable import Stage
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED
from ratchet.launch.restarts import Pulse
from ratchet.paths import RunPaths

RENDEZVOUS = "rendezvous"


@dataclass(frozen=True)
class Recipe:
    """What it takes to start an incarnation of a program: `python -m ratchet.<role> RUN ATTEMPT INCARNATION ...`."""

    name: str
    """What it is called in this run: its role, and of several servers of one role its number."""
    role: str
    log: Path
    arguments: tuple[str, ...] = ()
    threads: int = 1
    ranks: int = 1
    fds: tuple[int, ...] = ()
    """File descriptors that the processes inherit."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """The processes of one incarnation, by rank, and the workshop that they share."""

    processes: "tuple[subprocess.Popen[bytes], ...]"
    workshop: Path
    pulses: tuple[Pulse, ...]

    @classmethod
    def start(
        cls, paths: RunPaths, recipe: Recipe, *, attempt: int, incarnation: int, token: str, frozen_s: float
    ) -> "Program":
        """Open the workshop and start every rank; their output goes to the recipe's log.

        Raises: Fenced if the launcher was replaced.
        """
        launcher = Stage(paths, attempts.token(attempt, "launcher", 0))
        workshop = launcher.open_for(token).directory
        command = [sys.executable, "-m", f"ratchet.{recipe.role}"]
        command += [str(paths.root), str(attempt), str(incarnation), *recipe.arguments]
        processes = []
        with recipe.log.open("ab") as output:
            for rank in range(recipe.ranks):
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=child_environment(recipe.threads)
                        | rank_environment(rank, recipe.ranks, workshop / RENDEZVOUS)
                        | {**recipe.environment},
                        pass_fds=recipe.fds,
                        start_new_session=True,  # a Ctrl-C reaches the launcher alone, which decides
                    )
                )
        now = time.monotonic()
        return cls(tuple(processes), workshop, tuple(Pulse(frozen_s, now) for _ in processes))

    @property
    def is_alive(self) -> bool:
        """Whether any process is there still."""
        return any(process.poll() is None for process in self.processes)

    def poll(self) -> int | None:
        """The exit code: at once where a rank failed, otherwise when all have ended; None before."""
        codes = [process.poll() for process in self.processes]
        failed = [code for code in codes if code not in (None, EXIT_OK, EXIT_STOPPED)]
        if failed:
            return _cause([code for code in failed if code is not None])
        return None if None in codes else max(code or EXIT_OK for code in codes)

    def is_frozen(self, now: float) -> bool:
        """Whether a rank that has not ended gives no sign of life. One look at each."""
        looks = [
            pulse.is_frozen(heartbeat.last_beat(self.workshop, rank), now)
            for rank, pulse in enumerate(self.pulses)
            if self.processes[rank].poll() is None
        ]
        return any(looks)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End what is left, and wait for that."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _cause(failed: list[int]) -> int:
    """Of several exit codes the telling one: a rank whose sibling is gone ends in a crash of its own."""
    told = [code for code in failed if code > EXIT_CRASH]
    return max(told) if told else min(failed)


def child_environment(threads: int) -> dict[str, str]:
    """Fixed thread counts, and who the parent is (see `process.die_with_parent`)."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {name: str(threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "RATCHET_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}


def rank_environment(rank: int, size: int, rendezvous: Path) -> dict[str, str]:
    """Who a rank is and where it meets the others: torchrun's names, and a file in place of its port.

    Nothing for a single rank. Ranks of one machine talk over its loopback interface.
    """
    if size == 1:
        return {}
    who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {
        **{name: str(value) for name, value in who.items()},
        "RATCHET_RENDEZVOUS": str(rendezvous),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
