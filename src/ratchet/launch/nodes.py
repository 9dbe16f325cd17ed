"""A further node of the trainer: start its ranks in whatever incarnation the first node opens, and watch them.

    first node     opens the attempt, fences, plans, restarts; watches every rank by its heartbeat
    this one       incarnation n is open        ─► starts its ranks in that workshop, once
                   its ranks failed             ─► says so in the workshop, waits for incarnation n + 1
                   the workshop is gone         ─► ends its ranks, waits for incarnation n + 1
                   another attempt is open      ─► the same there
                   the attempt is closed        ─► exit 0 if the run is complete, 75 if not

Waits for: the first node. When that is gone without a word, this one ends too, once nothing has happened for
longer than a replacement takes.
"""

import os
import subprocess
import time
from dataclasses import dataclass, field

from ratchet import attempts
from ratchet.attempts import Record
from ratchet.config import RunConfig, TrainerConfig
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, Fenced, Refusal
from ratchet.launch import notes
from ratchet.launch.join import newest, take_over
from ratchet.launch.program import Program, Ranks, Recipe
from ratchet.launch.restarts import BACKOFF_MAX_S
from ratchet.launch.stopping import Stopping
from ratchet.log import LOGGER
from ratchet.paths import RunPaths
from ratchet.stage import Stage

POLL_S = 0.1


def ranks_of(trainer: TrainerConfig) -> Ranks:
    """The ranks that this node starts."""
    return Ranks(trainer.nproc, trainer.node_rank, trainer.nnodes, trainer.rendezvous)


def join_trainer(config: RunConfig, trainer: TrainerConfig) -> int:
    """Run this node's ranks for the open attempt of `config.output_dir`, and for those that follow it.

    Raises: Refusal if no attempt opens within `launch.join_s`, or one of another layout; Fenced if the command of
    the same node is started again.
    """
    node = Node(RunPaths(config.output_dir), config, trainer)
    node.stopping.install()
    try:
        return node.run()
    finally:
        node.end()


@dataclass
class Node:
    """This node's part in the attempts of a run."""

    paths: RunPaths
    config: RunConfig
    trainer: TrainerConfig
    record: Record | None = None
    """Of the attempt in which it takes part."""
    stage: Stage | None = None
    """The workshop of this launcher: a later one of the same node renames it away."""
    program: Program | None = None
    begun: int = 0
    """The newest incarnation in which ranks of this node have begun."""
    heard_at: float = field(default_factory=time.monotonic)
    stopping: Stopping = field(default_factory=Stopping)
    is_told_where: bool = field(init=False)
    """Whether the first node chooses where they meet, anew in each attempt: so on Slurm."""

    def __post_init__(self) -> None:
        self.is_told_where = self.trainer.rendezvous is None

    def run(self) -> int:
        """Follow the run to the end of an attempt; the exit code."""
        while (code := self._look()) is None:
            time.sleep(POLL_S)
        return code

    def end(self) -> None:
        """End what this node has started."""
        if self.program is not None:
            self.program.kill()
            self.program = None

    def _look(self) -> int | None:
        """One look at everything; the exit code when there is nothing left to do. Raises: Fenced, Refusal"""
        if self.stopping.is_urgent or (self.stopping.is_asked and self.program is None):
            return EXIT_STOPPED
        record = newest(self.paths)
        if self.record is not None and record is not None and record.outcome is not None:
            return self._conclude(record.outcome.code)
        if self.record is None or record is None or record.attempt != self.record.attempt:
            self.end()
            self._try_to_enter(record)
        else:
            self.record = record
            self._check_place()
            if self.program is not None:
                self._watch(self.program)
            else:
                self._begin()
        return self._give_up()

    def _try_to_enter(self, record: Record | None) -> None:
        """Take part in an attempt, if it is open. Raises: Refusal if it is laid out otherwise"""
        if record is None or not record.applied or record.outcome is not None:
            return
        there: TrainerConfig = attempts.read_config(self.paths, record).trainer
        mine, its = (f"{t.nnodes} nodes with {t.nproc} processes" for t in (self.trainer, there))
        if mine != its:
            raise Refusal(
                f"{self.paths.root} is trained on {its}, this command says {mine}: give every node the same command, "
                "but for --trainer.node-rank."
            )
        if self.is_told_where:
            self.trainer = self.trainer.model_copy(update={"rendezvous": there.rendezvous})
        role = f"node{self.trainer.node_rank}"
        try:
            incarnation = take_over(self.paths, record, role)
        except (Fenced, FileNotFoundError):
            return  # that attempt has just ended: another one may follow
        self.stage = Stage(self.paths, attempts.token(record.attempt, role, incarnation))
        self.record, self.begun = record, 0
        self._hear()
        LOGGER.info("node %d joins attempt %d of %s", self.trainer.node_rank, record.attempt, self.paths.root)

    def _hear(self) -> None:
        self.heard_at = time.monotonic()

    def _check_place(self) -> None:
        """Raises: Fenced if this node was started again; Unwritable if the run directory is gone.

        A new attempt also renames the workshop away, a moment before there is a record of it.
        """
        assert self.stage is not None
        if self.stage.directory.exists():
            return
        prefix, _, mine = self.stage.token.rpartition(".")
        names = os.listdir(self.paths.staging) if self.paths.staging.exists() else []
        later = [n for n in names if n.startswith(f"{prefix}.") and int(n.rpartition(".")[2]) > int(mine)]
        if later or not self.paths.staging.exists():
            self.stage.check()

    def _begin(self) -> None:
        """Start this node's ranks in the newest incarnation, if they have not been there."""
        assert self.record is not None
        attempt = self.record.attempt
        incarnation = max((r.incarnation for r in self.record.restarts if r.role == "trainer"), default=1)
        workshop = self.paths.staging / attempts.token(attempt, "trainer", incarnation)
        if incarnation == self.begun or not workshop.exists():
            return
        try:
            is_first = notes.take(workshop, self.trainer.node_rank)
        except FileNotFoundError:
            return
        self._hear()
        self.begun = incarnation
        if not is_first:
            # An earlier launcher's ranks were here and may not come twice: another incarnation is needed.
            notes.report(workshop, self.trainer.node_rank, EXIT_CRASH)
            return
        log = self.paths.attempt(attempt) / f"trainer.node{self.trainer.node_rank}.log"
        self.program = Program.start(
            Recipe("trainer", "trainer", log, threads=self.trainer.threads, ranks=ranks_of(self.trainer)),
            self.paths.root,
            attempt=attempt,
            incarnation=incarnation,
            workshop=workshop,
            frozen_s=self.config.launch.frozen_s,
        )

    def _watch(self, program: Program) -> None:
        """End the ranks with their incarnation; say it if they ended first; pass on a request to stop."""
        self._hear()
        if not program.workshop.exists():
            self.end()
            return
        if self.stopping.is_asked:
            notes.ask_to_stop(program.workshop, self.trainer.node_rank)
        code = program.poll()
        if code is not None and code not in (EXIT_OK, EXIT_STOPPED):
            LOGGER.error("the ranks of this node ended with exit code %d", code)
            notes.report(program.workshop, self.trainer.node_rank, code)
            self.end()

    def _conclude(self, code: int) -> int:
        """The attempt is closed. Where the run is complete, its last ranks are leaving."""
        if code != EXIT_OK:
            return EXIT_STOPPED
        for process in self.program.processes.values() if self.program is not None else ():
            try:
                process.wait(self.config.launch.frozen_s)
            except subprocess.TimeoutExpired:
                return EXIT_CRASH
        return EXIT_OK

    def _give_up(self) -> int | None:
        """Whether the first node has been silent for too long. Raises: Refusal if it never opened the run"""
        launch = self.config.launch
        silent_s = time.monotonic() - self.heard_at
        if self.record is None and silent_s > launch.join_s:
            raise Refusal(
                f"No attempt is open in {self.paths.root} after {launch.join_s:g} s (launch.join_s): start the same "
                "command with --trainer.node-rank 0 on the first node."
            )
        if self.record is not None and silent_s > launch.frozen_s + BACKOFF_MAX_S:
            LOGGER.error("the first node is gone: run the same command again on every node")
            return EXIT_STOPPED
        return None
