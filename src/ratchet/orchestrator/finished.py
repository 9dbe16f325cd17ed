"""Finished rollouts: written to the journal at once, and used after a crash instead of being played again.

Who waits for whom: `run` writes on the tick after a rollout was kept, and has it on the disk within SYNC_S;
nobody waits for either.
"""

import asyncio
from collections.abc import Container

from ratchet import journal
from ratchet.attempts import Assignment
from ratchet.config import EnvConfig, RLConfig
from ratchet.journal import Entry, Journal, RolloutId
from ratchet.orchestrator.play import Place, usable
from ratchet.orchestrator.target import Target
from ratchet.records import RolloutFailure, Sample


class Finished:
    """The journal as the loop uses it. `replayed` and `mismatched` count what was found in it."""

    def __init__(
        self,
        run: Assignment,
        inputs: str,
        target: Target,
        unsettled: Container[int],
    ) -> None:
        """`inputs` is the digest of what the run reads. Raises: Damaged."""
        config: RLConfig = run.config
        self._inputs = inputs
        self._is_exact = config.deterministic
        self._target = target
        self._keys = {env.label: key(run, env) for env in config.orchestrator.env}
        self._journal = Journal(run.stage)
        self._journal.restore(unsettled)
        self._is_pending = asyncio.Event()
        self.replayed = 0
        self.mismatched = 0
        self.input_changed = 0

    def find(self, place: Place) -> Sample | RolloutFailure | None:
        """The outcome of a rollout that was finished before a crash, if it is what would be played now."""
        entry = self._journal.find(RolloutId(place.env, place.draw, place.rollout))
        if entry is None:
            return None
        settings, _, inputs = entry.key.partition("/")
        if settings != self._keys[place.env] or (self._is_exact and entry.policy != self._target.name):
            self.mismatched += 1
            return None
        if inputs != self._inputs:
            self.input_changed += 1
            return None
        self.replayed += 1
        outcome = entry.outcome
        # An older version kept scores that no batch can be made of.
        return usable(outcome) if isinstance(outcome, Sample) else outcome

    def keep(self, place: Place, outcome: Sample | RolloutFailure) -> None:
        """Remember the outcome of a rollout."""
        self._journal.append(
            Entry(
                env=place.env,
                draw=place.draw,
                rollout=place.rollout,
                key=f"{self._keys[place.env]}/{self._inputs}",
                policy=self._target.name,
                sample=outcome if isinstance(outcome, Sample) else None,
                failure=outcome if isinstance(outcome, RolloutFailure) else None,
            )
        )
        self._is_pending.set()

    def write(self) -> None:
        self._journal.write()

    async def run(self) -> None:
        """Write what is kept, until cancelled. Raises: Fenced, OSError."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_soon())
            tasks.create_task(self._sync_often())

    async def _write_soon(self) -> None:
        while True:
            await self._is_pending.wait()
            self._is_pending.clear()
            self._journal.write()

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(journal.SYNC_S)
            await asyncio.to_thread(self._journal.sync)

    async def trim(self, unsettled: Container[int]) -> None:
        """Delete what a published state made superfluous. Raises: Fenced."""
        await asyncio.to_thread(self._journal.trim, self._journal.release(unsettled))


def key(run: Assignment, env: EnvConfig) -> str:
    """Every setting that a rollout's tokens and reward depend on, besides the inputs, as one digest."""
    run_config: RLConfig = run.config
    return journal.digest(
        {
            "run": [run.run_id, run.lineage, run_config.seed],
            "env": env.label,
            "sampling": run_config.orchestrator.sampling.model_dump(mode="json"),
            "group_size": run_config.orchestrator.group_size,
        }
    )
