"""Start the programs of an attempt, watch them, pass signals on; replace one that died or froze.

Who may end first: a trainer that reached max_steps (the orchestrator still plays the last evaluation), or an
orchestrator that has emitted the last batch. Inference never; it is stopped last.

A replacement is a new incarnation of one program while the others go on, in this order: fence the old one by renaming
its workshop away, kill what is left of it, plan and record, start. One that fails too often stops all, unless it is a
server beside which another one is left.
"""

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ratchet import attempts, durable, metrics, resume
from ratchet.attempts import Plan, Restart
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, Refusal
from ratchet.launch import restarts
from ratchet.launch.births import Nursery
from ratchet.launch.opening import Attempt
from ratchet.launch.program import Program, Ranks, Recipe
from ratchet.launch.stopping import Stopping
from ratchet.report.console import Console

POLL_S = 0.05
PULSE_S = 0.5
GRACE_S = 20.0
LAST_LINES = 15


@dataclass
class Child:
    """One program of the run: its newest incarnation, and what it takes to start another."""

    recipe: Recipe
    program: Program
    incarnation: int = 1
    restarted_at: list[float] = field(default_factory=list)
    due_at: float | None = None
    """When the next incarnation starts; None once it did, and where there is none."""
    was_frozen: bool = False
    """The launcher killed it for giving no sign of life."""
    is_given_up: bool = False
    """It failed too often, and the run goes on without it."""

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def role(self) -> str:
        return self.recipe.role

    @property
    def is_server(self) -> bool:
        return self.role == "inference"

    def poll(self) -> int | None:
        """The exit code, if it ended and that is not settled yet."""
        return self.program.poll() if self.due_at is None and not self.is_given_up else None

    def tail(self) -> str:
        lines = self.recipe.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


@dataclass
class Supervisor:
    """Starts, watches, replaces and stops the children of one attempt."""

    attempt: Attempt
    console: Console
    children: dict[str, Child] = field(default_factory=dict)
    stopping: Stopping = field(default_factory=Stopping)
    pulses_taken_at: float = 0.0
    nursery: Nursery | None = None
    """Where the programs that need torch come from."""

    def start(
        self,
        role: str,
        *arguments: str,
        name: str = "",
        threads: int = 1,
        ranks: Ranks = Ranks(),
        fds: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the first incarnation of a program; `fds` stay open here, for those that may follow."""
        name = name or role
        log = self.attempt.paths.attempt(self.attempt.record.attempt) / f"{name}.log"
        recipe = Recipe(name, role, log, arguments, threads, ranks, fds, environment or {})
        self.children[name] = Child(recipe, self._start(recipe, 1))

    def _start(self, recipe: Recipe, incarnation: int) -> Program:
        """Open its workshop and start it there. Raises: Fenced if this launcher was replaced"""
        number = self.attempt.record.attempt
        workshop = self.attempt.stage.open_for(attempts.token(number, recipe.name, incarnation))
        return Program.start(
            recipe,
            self.attempt.paths.root,
            attempt=number,
            incarnation=incarnation,
            workshop=workshop.directory,
            frozen_s=self.attempt.config.launch.frozen_s,
            nursery=self.nursery,
        )

    def run(self) -> tuple[int, str]:
        """Watch until every program has done its work; returns the exit code and the reason."""
        asked = False
        while True:
            self.console.refresh()
            if any(child.program.is_asked_to_stop for child in self.children.values()):
                self.stopping.is_told = True
            if self.stopping.is_urgent:
                self.kill()
                return EXIT_STOPPED, "stopped at once by a second signal"
            if self.stopping.is_asked and not asked:
                self.console.say("Stopping after this step; once more to stop at once.")
                self.signal("trainer", signal.SIGTERM)
                asked = True
            self._kill_frozen()
            if (verdict := self._judge(asked)) is not None:
                self.console.refresh()
                return verdict
            if not asked:
                self._start_due()
            self._rest()

    def _rest(self) -> None:
        if self.nursery is not None:
            self.nursery.rest(POLL_S)
        else:
            time.sleep(POLL_S)

    def _judge(self, asked: bool) -> tuple[int, str] | None:
        """What the exit codes so far mean: None while there is work to be done."""
        trainer = self.children.get("trainer")
        if asked and trainer and (trainer.due_at or trainer.poll() in (EXIT_OK, EXIT_STOPPED)):
            self.stop_all()
            return EXIT_STOPPED, "stopped on request"
        for child in self.children.values():
            code = child.poll()
            if code is None or (code == EXIT_OK and not child.is_server):
                continue
            why = "" if asked else self._replace(child, code)
            if why is not None and not self._goes_on_without(child, code, why):
                self.stop_all()
                return self._failure(child, code or EXIT_CRASH, why)
        if all(child.poll() == EXIT_OK for child in self.children.values() if not child.is_server):
            self.stop_all()
            return EXIT_OK, "complete"
        return None

    def _goes_on_without(self, child: Child, code: int, why: str) -> bool:
        """Give up a server that crashed too often, if another one is left."""
        others = [other for other in self.children.values() if other.is_server and other is not child]
        if not why or not child.is_server or all(other.is_given_up for other in others):
            return False
        child.is_given_up = True
        self.console.say(
            f"The {child.name} {_how(child, code)}; {why}. The run goes on without it; its last lines "
            f"({child.recipe.log}):\n{child.tail()}"
        )
        return True

    def _replace(self, child: Child, code: int) -> str | None:
        """Fence a program that ended and schedule its next incarnation; or return why there is none."""
        now = time.monotonic()
        verdict = restarts.judge(self.attempt.config.launch, code, child.restarted_at, now)
        if verdict.delay_s is None:
            return verdict.why
        self._fence(child)
        child.program.kill()
        try:
            plan = self._plan(child.role)
        except Refusal as error:
            return f"it cannot continue alone: {error}"
        reason, child.was_frozen = _how(child, code), False
        child.incarnation += 1
        child.restarted_at.append(now)
        child.due_at = now + verdict.delay_s
        self._record(Restart(role=child.name, incarnation=child.incarnation, reason=reason, plan=plan))
        self.console.say(
            f"The {child.name} {reason}: incarnation {child.incarnation} {self._where(child.role, plan)}, "
            f"in {verdict.delay_s:g} s."
        )
        return None

    def _fence(self, child: Child) -> None:
        prefix = attempts.token(self.attempt.record.attempt, child.name, 0)[:-1]
        self.attempt.stage.revoke(prefix)

    def _plan(self, role: str) -> Plan | None:
        """A trainer alone needs a place to start; the others find theirs in the log. Raises: Refusal"""
        if role != "trainer":
            return None
        return resume.decide_trainer(self.attempt.paths, self.attempt.record.kind)

    def _record(self, restart: Restart) -> None:
        """Commit a restart, then cut the trainer's rows back to where it starts."""
        attempt = self.attempt
        done = (*attempt.record.restarts, restart)
        attempt.record = attempts.write(attempt.stage, msgspec.structs.replace(attempt.record, restarts=done))
        if restart.plan is not None:
            path = attempt.paths.metric("trainer")
            metrics.rewind(attempt.stage, path, restart.plan.step)

    def _where(self, role: str, plan: Plan | None) -> str:
        if plan is not None:
            replay = f", replaying batches {plan.step} to {plan.next_batch - 1}"
            return f"continues at step {plan.step}{replay if plan.next_batch > plan.step else ''}"
        if role == "orchestrator":
            # The log is never empty again once it was begun.
            batch = max(durable.steps(self.attempt.paths.batches), default=-1) + 1
            return f"continues at batch {max(batch, self.attempt.record.plan.next_batch)}"
        return "serves on the same port"

    def _start_due(self) -> None:
        for child in self.children.values():
            if child.due_at is not None and time.monotonic() >= child.due_at:
                child.program = self._start(child.recipe, child.incarnation)
                child.due_at = None

    def _kill_frozen(self) -> None:
        """End what gives no sign of life, fenced first: it may publish nothing between the two."""
        now = time.monotonic()
        if now - self.pulses_taken_at < PULSE_S:
            return
        self.pulses_taken_at = now
        for child in self.children.values():
            if child.due_at is None and not child.is_given_up and child.program.is_frozen(now):
                child.was_frozen = True
                self._fence(child)
                child.program.kill()

    def _failure(self, child: Child, code: int, why: str) -> tuple[int, str]:
        reason = f"{child.name} {_how(child, code)}" + (f"; {why}" if why else "")
        self.console.say(f"The {reason}; its last lines ({child.recipe.log}):\n{child.tail()}")
        return code if code > 0 else EXIT_CRASH, reason

    def signal(self, role: str, number: int) -> None:
        for child in self.children.values():
            if child.role == role:
                child.program.signal(number)

    def stop_all(self) -> None:
        """Ask everyone, the trainer first because it may save; insist after the grace period."""
        for role in ("trainer", "orchestrator", "inference"):
            self.signal(role, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(c.program.is_alive for c in self.children.values()):
            self.console.refresh()
            time.sleep(POLL_S)
        self.kill()

    def kill(self) -> None:
        for child in self.children.values():
            child.program.kill()


def _how(child: Child, code: int) -> str:
    if child.was_frozen:
        return "gave no sign of life (launch.frozen_s) and was killed"
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
