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
import time
from collections import Counter

from ratchet import batchlog, ledger, metrics
from ratchet.attempts import Assignment
from ratchet.chat import Chat
from ratchet.config import RLConfig
from ratchet.envs.base import Environment
from ratchet.inputs.seen import Guard
from ratchet.log import LOGGER
from ratchet.now import Now
from ratchet.orchestrator.activity import Activity
from ratchet.orchestrator.batches import credited, exact_row
from ratchet.orchestrator.counts import Counting
from ratchet.orchestrator.evals import Evaluator
from ratchet.orchestrator.finished import Finished
from ratchet.orchestrator.play import Place, Player, Sampling
from ratchet.orchestrator.policies import Policies
from ratchet.orchestrator.pool import Pool
from ratchet.orchestrator.scheduler import Batch, Draw, Scheduler
from ratchet.records import RolloutFailure, Sample
from ratchet.timeline import Timeline

POLL_S = 0.02
FENCE_CHECK_S = 1.0


class Orchestrator:
    """One incarnation of the orchestrator of an attempt."""

    def __init__(
        self,
        run: Assignment,
        pool: Pool,
        chat: Chat,
        envs: dict[str, Environment],
        scheduler: Scheduler,
        policies: Policies,
        guard: Guard,
        wake: asyncio.Event,
    ) -> None:
        self._run = run
        self._config: RLConfig = run.config
        self._pool = pool
        self._envs = envs
        self._scheduler = scheduler
        self._player = Player(
            chat, pool, guard, seed=self._config.seed, replays=self._config.orchestrator.client.retries
        )
        self._evaluator = Evaluator(run, self._player, chat, envs)
        self._finished = Finished(run, guard.inputs.digest, pool.target, scheduler.unsettled())
        self._policies = policies
        self._is_evaluating = False
        self._wake = wake
        self._counting = Counting(pool, self._player, self._finished, scheduler)
        self._timeline = Timeline(run.stage)
        self._activity = Activity(self._timeline)
        self._fence_checked = 0.0

    @property
    def is_done(self) -> bool:
        return self._scheduler.is_complete and not self._policies.owed

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
            evaluating=self._policies.owed[0] if self._is_evaluating else None,
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
        row = exact_row(batch, samples, self._scheduler.progress) | self._counting.row(samples)
        oldest = self._pool.oldest
        self._start_groups(tasks)
        await asyncio.to_thread(self._publish, batch.step, samples, state, row, oldest)
        self._timeline.add("batch", batch.step + 1, time.perf_counter() - started)
        await self._finished.trim(unsettled)

    def _publish(
        self, step: int, samples: list[Sample], state: bytes, row: metrics.Row, oldest_served: int
    ) -> None:
        stage = self._run.stage
        manifest = batchlog.publish(
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
        ledger.append(stage, ledger.line(manifest, samples, state))

    async def _adopt_next(self, tasks: asyncio.TaskGroup) -> bool:
        """Adopt the next policy if it is published and nothing holds the servers at this one."""
        if self._is_evaluating:
            return False
        policy = self._policies.next()
        if policy is None:
            return False
        with self._timeline.phase("adopt", policy.step):
            await self._pool.adopt(policy)
        if self._policies.owed and self._policies.owed[0] == policy.step:
            self._is_evaluating = True
            tasks.create_task(self._evaluate(policy.step))
        return True

    async def _evaluate(self, step: int) -> None:
        assert self._config.orchestrator.eval is not None
        await self._pool.settled()
        with self._timeline.phase("eval", step):
            await self._evaluator.play(self._config.orchestrator.eval, step)
        self._policies.owed.remove(step)
        self._is_evaluating = False
        self._wake.set()
