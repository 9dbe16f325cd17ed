"""One incarnation of a role, as the operating system sees it: one process, or the ranks of the trainer.

Ranks live and die together: one that fails ends its incarnation, and the launchers end the others. They find each
other through a file in their workshop, or, on several nodes, at an address under the incarnation's name, so those of
two incarnations can never meet.

Between nodes the workshop is the only messenger. In it lie a heartbeat of each rank and the notes of each node's
launcher (`notes.py`); it is renamed away with the incarnation, and whatever is said in it too late is lost with it.
"""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ratchet import heartbeat
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED
from ratchet.launch import notes
from ratchet.launch.births import Nursery, Process
from ratchet.launch.early import MODULES, child_environment
from ratchet.launch.restarts import Pulse
from ratchet.nursery import Order

RENDEZVOUS = "rendezvous"


@dataclass(frozen=True)
class Ranks:
    """Which of a trainer's ranks this machine starts."""

    here: int = 1
    node: int = 0
    nodes: int = 1
    rendezvous: str | None = None
    """`host:port` where the nodes meet."""

    @property
    def total(self) -> int:
        return self.here * self.nodes

    @property
    def own(self) -> range:
        return range(self.node * self.here, (self.node + 1) * self.here)


@dataclass(frozen=True)
class Recipe:
    """What it takes to start an incarnation of a program: `python -m ratchet.<role> RUN ATTEMPT INCARNATION ...`."""

    name: str
    """What it is called in this run: its role, and of several servers of one role its number."""
    role: str
    log: Path
    arguments: tuple[str, ...] = ()
    threads: int = 1
    ranks: Ranks = Ranks()
    fds: tuple[int, ...] = ()
    """File descriptors that the processes inherit."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """The processes of one incarnation on this machine, and the workshop that they share with those of others."""

    processes: dict[int, Process]
    """By rank."""
    workshop: Path
    pulses: dict[int, Pulse]
    """Of every rank; those of other machines count from their first sign of life."""

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        run: Path,
        *,
        attempt: int,
        incarnation: int,
        workshop: Path,
        frozen_s: float,
        nursery: Nursery | None = None,
    ) -> "Program":
        """Start every rank of this machine in a workshop that is open; their output goes to the recipe's log."""
        processes = {}
        for rank in recipe.ranks.own:
            order = Order(
                module=f"ratchet.{recipe.role}",
                arguments=[str(run), str(attempt), str(incarnation), *recipe.arguments],
                environment=child_environment(recipe.threads, keeps_memory=recipe.role in MODULES)
                | rank_environment(rank, recipe.ranks, workshop)
                | {**recipe.environment},
                log=str(recipe.log),
                fds=list(recipe.fds),
            )
            alone = functools.partial(_start_alone, order)
            has_nursery = nursery is not None and recipe.role in nursery.roles
            processes[rank] = nursery.start(order, alone) if nursery and has_nursery else alone()
        now = time.monotonic()
        pulses = {rank: Pulse(frozen_s, now) for rank in range(recipe.ranks.total)}
        return cls(processes, workshop, pulses)

    @property
    def is_alive(self) -> bool:
        """Whether any process is there still."""
        return any(process.poll() is None for process in self.processes.values())

    @property
    def _has_others(self) -> bool:
        return len(self.pulses) > len(self.processes)

    def poll(self) -> int | None:
        """The exit code: at once where a rank failed, on whichever node; otherwise when all have ended; None before."""
        codes = [process.poll() for process in self.processes.values()]
        failed = [code for code in codes if code not in (None, EXIT_OK, EXIT_STOPPED)]
        if self._has_others:
            failed += notes.failures(self.workshop)
        if failed:
            return _cause([code for code in failed if code is not None])
        return None if None in codes else max(code or EXIT_OK for code in codes)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether the launcher of another node was asked to stop."""
        return self._has_others and self.is_alive and notes.is_asked_to_stop(self.workshop)

    def is_frozen(self, now: float) -> bool:
        """Whether a rank that has not ended gives no sign of life. One look at each."""
        looks = [
            pulse.is_frozen(heartbeat.last_beat(self.workshop, rank), now)
            for rank, pulse in self.pulses.items()
            if self._is_watched(rank)
        ]
        return any(looks)

    def _is_watched(self, rank: int) -> bool:
        if (process := self.processes.get(rank)) is not None:
            return process.poll() is None
        # How long a node takes to join is not for us to say; all ranks end together.
        return self.is_alive and heartbeat.last_beat(self.workshop, rank) is not None

    def signal(self, number: int) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End what is left, and wait for that."""
        self.signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()


def _start_alone(order: Order) -> Process:
    """A process of its own, which imports everything itself."""
    with Path(order.log).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", order.module, *order.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=order.environment,
            pass_fds=order.fds,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which decides
        )


def _cause(failed: list[int]) -> int:
    """Of several exit codes the telling one: a rank whose sibling is gone ends in a crash of its own."""
    told = [code for code in failed if code > EXIT_CRASH]
    return max(told) if told else min(failed)


def rank_environment(rank: int, ranks: Ranks, workshop: Path) -> dict[str, str]:
    """Who a rank is and where it meets the others: torchrun's names, and the meeting place of its incarnation.

    Nothing for a single rank. Ranks of one machine talk over its loopback interface.
    """
    if ranks.total == 1:
        return {}
    who = {
        "RANK": rank,
        "LOCAL_RANK": rank - ranks.own.start,
        "WORLD_SIZE": ranks.total,
        "LOCAL_WORLD_SIZE": ranks.here,
    }
    found = {name: str(value) for name, value in who.items()}
    if ranks.nodes == 1:
        found["RATCHET_RENDEZVOUS"] = str(workshop / RENDEZVOUS)
    else:
        found["RATCHET_RENDEZVOUS"] = f"tcp://{ranks.rendezvous}/{workshop.name}"
    host = (ranks.rendezvous or "localhost").rpartition(":")[0] or "localhost"
    if host in ("localhost", "127.0.0.1"):
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return found
