"""Which policy the servers are given next: what sampling needs, and each one that is to be evaluated."""

from ratchet.attempts import Assignment
from ratchet.errors import RatchetError
from ratchet.log import LOGGER
from ratchet.orchestrator import evals
from ratchet.orchestrator.scheduler import Rules, Scheduler
from ratchet.orchestrator.target import Target
from ratchet.weights import Policy


class Policies:
    """`owed` are the steps whose evaluation is due and not published yet, in order."""

    def __init__(self, run: Assignment, rules: Rules, scheduler: Scheduler, target: Target) -> None:
        self._places = target.places
        self._run = run
        self._rules = rules
        self._scheduler = scheduler
        self._target = target
        self.owed = evals.owed(run.paths, run.config)

    def next(self) -> Policy | None:
        """The policy to adopt now; None while it is not published, or the servers are given the right one already."""
        step = self._next_step()
        if step is None:
            return None
        return self._places.read_policy(step, run_id=self._run.run_id, lineage=self._run.lineage)

    def _next_step(self) -> int | None:
        """The policy to adopt next: what the next batch needs, but no evaluation is passed over."""
        wanted = self._wanted_step()
        if wanted is None and not self._scheduler.is_complete:
            return None
        while self.owed and (wanted is None or self.owed[0] <= wanted):
            step = self.owed[0]
            if not evals.is_gone(self._places, step):
                return step if self._places.is_published(step) else None
            LOGGER.warning("policy %d is gone, so it cannot be evaluated any more", step)
            self.owed.pop(0)
        return wanted

    def _wanted_step(self) -> int | None:
        """What sampling wants, evaluations aside; None while the servers are given it already."""
        scheduler, current = self._scheduler, self._target.step
        if scheduler.is_complete:
            return None
        if self._rules.deterministic:
            required = self._rules.required_policy(scheduler.next_batch)
            if required < self._run.plan.step and not self._places.is_published(required):
                raise RatchetError(
                    f"Policy {required}, which alone may sample batch {scheduler.next_batch}, is gone, and the "
                    f"trainer begins at {self._run.plan.step}: resume from another checkpoint (`ckpt ls` lists them)."
                )
            return required if required > current else None
        if current >= 0:
            return self._places.newest(above=current)
        listed = [s for s in self._places.steps() if s <= scheduler.next_batch]
        return max((s for s in listed if self._places.is_published(s)), default=None)
