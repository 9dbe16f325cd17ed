"""Finished rollouts: written to the journal at once, and used after a crash instead of being played again.

Who waits for whom: `run` writes on the tick after a rollout was kept, and has it on the disk within SYNC_S;
nobody waits for either.
"""

import asyncio
import inspect
from collections.abc import Container, Mapping
from pathlib import Path

from ratchet import durable, journal
from ratchet.attempts import Assignment
from ratchet.config import EnvConfig, RLConfig
from ratchet.envs.base import Environment
from ratchet.journal import Entry, Journal, RolloutId
from ratchet.orchestrator.play import Place, usable
from ratchet.orchestrator.target import Target
from ratchet.records import RolloutFailure, Sample


class Finished:
    """The journal as the loop uses it. `replayed` and `mismatched` count what was found in it."""

    def __init__(
        self,
        run: Assignment,
        envs: Mapping[str, Environment],
        target: Target,
        unsettled: Container[int],
    ) -> None:
        """Raises: Damaged."""
        config: RLConfig = run.config
        self._is_exact = config.deterministic
        self._target = target
        self._keys = {env.label: key(run, env, envs[env.label]) for env in config.orchestrator.env}
        self._journal = Journal(run.stage)
        self._journal.restore(unsettled)
        self._is_pending = asyncio.Event()
        self.replayed = 0
        self.mismatched = 0

    def find(self, place: Place) -> Sample | RolloutFailure | None:
        """The outcome of a rollout that was finished before a crash, if it is what would be played now."""
        entry = self._journal.find(RolloutId(place.env, place.draw, place.rollout))
        if entry is None:
            return None
        is_same = entry.key == self._keys[place.env]
        if not is_same or (self._is_exact and entry.policy != self._target.name):
            self.mismatched += 1
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
                key=self._keys[place.env],
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


def key(run: Assignment, config: EnvConfig, env: Environment) -> str:
    """Everything configured that a rollout's tokens and reward depend on, as one digest."""
    run_config: RLConfig = run.config
    return journal.digest(
        {
            "run": [run.run_id, run.lineage, run_config.seed],
            "model": run_config.model.model_dump(mode="json"),
            "env": [config.label, config.id, config.args, env.fingerprint(), _code(env)],
            "sampling": run_config.orchestrator.sampling.model_dump(mode="json"),
            "group_size": run_config.orchestrator.group_size,
        }
    )


def _code(env: Environment) -> str:
    """A digest of the file that defines an environment, so that an edited reward is not mixed with the old one."""
    try:
        return durable.hash_file(Path(inspect.getfile(type(env))))
    except (OSError, TypeError):
        return ""
