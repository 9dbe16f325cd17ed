"""The orchestrator: plays rollouts, emits batches, and keeps the servers at the right policy.

The scheduler decides what is drawn, this file carries it out. Who waits for whom:

    group tasks    a server with room for a request (Pool)
    main loop      a finished group or evaluation, or POLL_S, after which it looks for new weights
    adoption       the end of a running evaluation, which is played by one policy alone
    an evaluation  until all servers in use hold its policy
    a batch        its publication; rollouts go on meanwhile

An exception in any task stops all others and the program: nothing is logged and ignored.
"""

import asyncio
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ratchet import batchlog, checkpoint, durable, heartbeat, ledger, metrics, resume, weights
from ratchet.attempts import Assignment
from ratchet.chat import Chat
from ratchet.config import RLConfig
from ratchet.envs import registry
from ratchet.envs.base import Environment
from ratchet.errors import RatchetError, Stopped
from ratchet.log import LOGGER
from ratchet.now import Now
from ratchet.orchestrator import evals
from ratchet.orchestrator.activity import Activity
from ratchet.orchestrator.batches import credited, exact_row
from ratchet.orchestrator.client import Client
from ratchet.orchestrator.evals import Evaluator
from ratchet.orchestrator.finished import Finished
from ratchet.orchestrator.play import Place, Player, Sampling
from ratchet.orchestrator.pool import Pool, Use, use_rows
from ratchet.orchestrator.routing import Rules as RoutingRules
from ratchet.orchestrator.scheduler import Batch, Draw, EnvShare, Rules, Scheduler
from ratchet.orchestrator.target import Target
from ratchet.records import RolloutFailure, Sample
from ratchet.timeline import Timeline

POLL_S = 0.02
FENCE_CHECK_S = 1.0
_SLOTS_UNKNOWN = 256
# In every row; others only where they occurred.
_FAULTS = ("retries", "reconciled", "failovers", "servers_lost", "servers_silent")


@dataclass
class Counts:
    """What a batch's row tells about clocks and faults, since the batch before."""

    since: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    uses: list[Use] = field(default_factory=list)
    replayed: int = 0
    mismatched: int = 0
    env_s: float = 0.0
    play_s: float = 0.0


class Orchestrator:
    """One incarnation of the orchestrator of an attempt."""

    def __init__(
        self,
        run: Assignment,
        pool: Pool,
        chat: Chat,
        envs: dict[str, Environment],
        scheduler: Scheduler,
        wake: asyncio.Event,
    ) -> None:
        self._run = run
        self._config: RLConfig = run.config
        self._pool = pool
        self._envs = envs
        self._scheduler = scheduler
        self._player = Player(chat, pool, replays=self._config.orchestrator.client.retries)
        self._evaluator = Evaluator(run, self._player, chat, envs)
        self._finished = Finished(run, envs, pool.target, scheduler.unsettled())
        self._owed = evals.owed(run.paths, self._config)
        self._is_evaluating = False
        self._wake = wake
        self._counts = Counts(uses=pool.usage())
        self._timeline = Timeline(run.stage)
        self._activity = Activity(self._timeline)
        self._fence_checked = 0.0

    @property
    def is_done(self) -> bool:
        return self._scheduler.is_complete and not self._owed

    async def run(self) -> None:
        """Emit every batch and play every evaluation that is left. Cancelled, it leaves nothing half-done."""
        if self.is_done:
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                helpers = [tasks.create_task(self._pool.run()), tasks.create_task(self._finished.run())]
                await self._pool.connect()
                LOGGER.info("at batch %d, by inference at %s", self._scheduler.next_batch, self._pool.urls)
                await self._work(tasks)
                for helper in helpers:
                    helper.cancel()
        finally:
            self._finished.write()

    async def _work(self, tasks: asyncio.TaskGroup) -> None:
        while not self.is_done:
            self._check_fence()
            self._start_groups(tasks)
            self._activity.see(self._scheduler.running, self._scheduler.next_batch)
            if (batch := self._scheduler.take_batch()) is not None:
                await self._emit(batch, tasks)
            elif not await self._adopt_next(tasks):
                await self._wait()

    def _check_fence(self) -> None:
        """Raises: Fenced if this process was replaced; it may wait for weights, and so not notice otherwise."""
        now = time.monotonic()
        if now - self._fence_checked > FENCE_CHECK_S:
            self._run.stage.check()
            self._fence_checked = now
            self._activity.tell(self._run.stage, self._now())

    def _now(self) -> Now:
        scheduler = self._scheduler
        return Now(
            policy=self._pool.step,
            batch=scheduler.next_batch,
            groups_running=scheduler.running,
            groups_ready=scheduler.ready,
            groups_wanted=self._config.orchestrator.groups_per_batch,
            rollouts_running=self._player.running,
            dropped=scheduler.rollouts_dropped,
            evaluating=self._owed[0] if self._is_evaluating else None,
        )

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _start_groups(self, tasks: asyncio.TaskGroup) -> None:
        while (draw := self._scheduler.start(self._pool.step)) is not None:
            tasks.create_task(self._play_group(draw))

    async def _play_group(self, draw: Draw) -> None:
        """Play those rollouts of one draw that the journal lacks, and hand the survivors to the scheduler."""
        size = self._config.orchestrator.group_size
        places = [Place("rollout", draw.env, draw.draw, rollout) for rollout in range(size)]
        results = {place: result for place in places if (result := self._finished.find(place)) is not None}
        if missing := [place for place in places if place not in results]:
            results |= await self._play(draw, missing)
        self._finish(draw, [results[place] for place in places])

    async def _play(self, draw: Draw, places: list[Place]) -> dict[Place, Sample | RolloutFailure]:
        opening = await self._player.open(self._envs[draw.env], draw.row, "train")
        if isinstance(opening, RolloutFailure):
            for place in places:
                self._finished.keep(place, opening)
            return dict.fromkeys(places, opening)
        sampling = Sampling(
            seed=self._config.seed,
            max_tokens=self._config.orchestrator.sampling.max_tokens,
            temperature=self._config.orchestrator.sampling.temperature,
        )

        async def play(place: Place) -> Sample | RolloutFailure:
            result = await self._player.play(opening, place, sampling)
            self._finished.keep(place, result)
            return result

        async with asyncio.TaskGroup() as group:
            plays = {place: group.create_task(play(place)) for place in places}
        return {place: task.result() for place, task in plays.items()}

    def _finish(self, draw: Draw, results: list[Sample | RolloutFailure]) -> None:
        samples = [result for result in results if isinstance(result, Sample)]
        failures = Counter(result.reason for result in results if isinstance(result, RolloutFailure))
        self._scheduler.finish(draw.draw, samples, failures)
        self._wake.set()

    async def _emit(self, batch: Batch, tasks: asyncio.TaskGroup) -> None:
        """Publish a batch with the state just after it; new rollouts start while it is written."""
        started = time.perf_counter()
        self._activity.end(self._scheduler.running)
        state, unsettled = self._scheduler.state(), self._scheduler.unsettled()
        samples = credited(batch.groups, divide_by_std=self._config.orchestrator.divide_by_std)
        row = exact_row(batch, samples, self._scheduler.progress) | self._faults(samples)
        oldest = self._pool.oldest
        self._start_groups(tasks)
        await asyncio.to_thread(self._publish, batch.step, samples, state, row, oldest)
        self._timeline.add("batch", batch.step + 1, time.perf_counter() - started)
        await self._finished.trim(unsettled)

    def _publish(
        self, step: int, samples: list[Sample], state: bytes, row: metrics.Row, oldest_served: int
    ) -> None:
        stage = self._run.stage
        batchlog.publish(
            stage,
            step=step,
            attempt=self._run.attempt,
            samples=samples,
            state=state,
            metrics=row,
            oldest_served=oldest_served,
            temperature=self._config.orchestrator.sampling.temperature,
        )
        metrics.append(stage, stage.paths.metric("orchestrator"), row, flush=True)
        ledger.append(stage, ledger.line(step, samples, state))

    def _faults(self, samples: list[Sample]) -> metrics.Row:
        """What a clock or a fault touches; and the counting starts afresh."""
        before = self._counts
        now = Counts(
            faults=self._pool.faults,
            uses=self._pool.usage(),
            replayed=self._finished.replayed,
            mismatched=self._finished.mismatched,
            env_s=self._player.env_s,
            play_s=self._player.play_s,
        )
        self._counts = now
        step_s = now.since - before.since
        faults: Counter[str] = Counter(dict.fromkeys(_FAULTS, 0))
        faults.update(now.faults)
        faults.subtract(before.faults)
        return {
            "time/at_s": round(time.time(), 3),
            "time/step_s": step_s,
            "time/env_s": round(now.env_s - before.env_s, 4),
            "time/rollouts_s": round(now.play_s - before.play_s, 4),
            "perf/groups_in_flight": self._scheduler.running,
            "perf/groups_ready": self._scheduler.ready,
            "perf/tokens_per_s": sum(sum(sample.mask) for sample in samples) / max(step_s, 1e-9),
            **use_rows(before.uses, now.uses, step_s),
            **{f"fault/{name}": count for name, count in faults.items()},
            "fault/replayed_from_journal": now.replayed - before.replayed,
            "fault/journal_mismatch": now.mismatched - before.mismatched,
        }

    async def _adopt_next(self, tasks: asyncio.TaskGroup) -> bool:
        """Adopt the next policy if it is published and nothing holds the servers at this one."""
        if self._is_evaluating:
            return False
        step = self._next_policy()
        if step is None:
            return False
        policy = weights.read_policy(
            self._run.paths, step, run_id=self._run.run_id, lineage=self._run.lineage
        )
        if policy is None:
            return False
        with self._timeline.phase("adopt", step):
            await self._pool.adopt(policy)
        if self._owed and self._owed[0] == step:
            self._is_evaluating = True
            tasks.create_task(self._evaluate(step))
        return True

    def _next_policy(self) -> int | None:
        """The policy to adopt next: what the next batch needs, but no evaluation is passed over."""
        wanted = self._wanted_policy()
        if wanted is None and not self._scheduler.is_complete:
            return None
        while self._owed and (wanted is None or self._owed[0] <= wanted):
            step = self._owed[0]
            if not evals.is_gone(self._run.paths, step):
                return step if weights.is_published(self._run.paths, step) else None
            LOGGER.warning("policy %d is gone, so it cannot be evaluated any more", step)
            self._owed.pop(0)
        return wanted

    def _wanted_policy(self) -> int | None:
        """What sampling wants, evaluations aside; None while the servers are given it already."""
        scheduler, current = self._scheduler, self._pool.target.step
        if scheduler.is_complete:
            return None
        if self._config.deterministic:
            required = rules_of(self._config).required_policy(scheduler.next_batch)
            if required < self._run.plan.step and not weights.is_published(self._run.paths, required):
                raise RatchetError(
                    f"Policy {required}, which alone may sample batch {scheduler.next_batch}, is gone, and the "
                    f"trainer begins at {self._run.plan.step}: resume from another checkpoint (`ckpt ls` lists them)."
                )
            return required if required > current else None
        if current >= 0:
            return weights.newest(self._run.paths, above=current)
        listed = [s for s in durable.steps(self._run.paths.weights) if s <= scheduler.next_batch]
        return max((s for s in listed if weights.is_published(self._run.paths, s)), default=None)

    async def _evaluate(self, step: int) -> None:
        assert self._config.orchestrator.eval is not None
        await self._pool.settled()
        with self._timeline.phase("eval", step):
            await self._evaluator.play(self._config.orchestrator.eval, step)
        self._owed.remove(step)
        self._is_evaluating = False
        self._wake.set()


def rules_of(config: RLConfig) -> Rules:
    return Rules(
        seed=config.seed,
        groups_per_batch=config.orchestrator.groups_per_batch,
        max_steps=config.max_steps,
        max_async_level=config.max_async_level,
        max_off_policy_steps=config.max_off_policy_steps,
        deterministic=config.deterministic,
    )


def routing_rules(config: RLConfig) -> RoutingRules:
    """Twice as many requests as slots keep a server busy; a group's prompt is worth one group's queue."""
    slots = config.inference.slots if config.inference is not None else _SLOTS_UNKNOWN
    return RoutingRules(
        capacity=2 * slots,
        slack=config.orchestrator.group_size,
        slow_start_s=config.orchestrator.client.slow_start_s,
    )


def next_batch(run: Assignment) -> int:
    """The first batch that is not in the log: the plan's, or later where this attempt already went on."""
    return max(run.plan.next_batch, max(durable.steps(run.paths.batches), default=-1) + 1)


def read_state(run: Assignment, batch: int) -> bytes | None:
    """The orchestrator's state before batch `batch`; None at the very start. Raises: Damaged, RatchetError."""
    if batch == 0:
        return None
    directory = run.paths.checkpoint(run.plan.step)
    if batch == run.plan.step and (directory / checkpoint.STATE).exists():
        durable.verify(directory)
        return (directory / checkpoint.STATE).read_bytes()
    last = run.paths.batch(batch - 1)
    if not last.exists():
        raise RatchetError(
            f"The orchestrator's state before batch {batch} is neither in {last} nor in {directory}: "
            "resume from another checkpoint (`ckpt ls` lists them)."
        )
    return batchlog.read_state(last)


def build_scheduler(run: Assignment, envs: dict[str, Environment]) -> Scheduler:
    """The scheduler at the place where the log ends; its rows completed."""
    config: RLConfig = run.config
    shares = [EnvShare(env.label, env.weight, envs[env.label].size) for env in config.orchestrator.env]
    scheduler = Scheduler(rules_of(config), shares)
    batch = next_batch(run)
    if (state := read_state(run, batch)) is not None:
        scheduler.restore(state)
    if scheduler.next_batch != batch:
        raise RatchetError(
            f"The orchestrator's state is that before batch {scheduler.next_batch}, the log ends before "
            f"batch {batch}: this run directory is not consistent."
        )
    resume.restore_rows(run.stage, batch)
    return scheduler


async def orchestrate(run: Assignment, base_urls: Sequence[str], *, is_own_server: bool) -> None:
    """Run one incarnation to its end. Raises: Stopped, Refusal, RatchetError, or whatever a task raised."""
    config: RLConfig = run.config
    client_config = config.orchestrator.client
    if is_own_server:
        # The launcher notices when it dies; how long a large model loads is nobody's error.
        client_config = client_config.model_copy(update={"wait_s": math.inf})
    chat = Chat.load(config.model.tokenizer or config.model.name)
    envs = {env.label: registry.build(env) for env in config.orchestrator.env}
    scheduler = build_scheduler(run, envs)
    target, rules = Target(run.paths, is_exact=config.deterministic), routing_rules(config)
    wake = asyncio.Event()
    heartbeat.follow_loop()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                Client(url, timeout_s=client_config.timeout_s, concurrency=rules.capacity)
            )
            for url in base_urls
        ]
        pool = Pool(clients, client_config, target, rules, on_change=wake.set)
        orchestrator = Orchestrator(run, pool, chat, envs, scheduler, wake)
        work = asyncio.create_task(orchestrator.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            # A batch that is being published is finished by its thread; what is in flight is played again.
            raise Stopped(
                f"stopped before batch {scheduler.next_batch}; the same command continues."
            ) from None
        except BaseExceptionGroup as group:
            raise _first(group) from group


def _first(error: BaseException) -> BaseException:
    """The exception that stopped the others."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
