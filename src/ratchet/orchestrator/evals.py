"""Held-out evaluation: evals/step_p is played by policy p alone and published once, immutable.

Crash: an evaluation that is not committed is played again, from the same seeds, if weights/step_p still exist.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import msgspec

from ratchet import durable, metrics
from ratchet.attempts import Assignment
from ratchet.chat import Chat
from ratchet.config import EvalConfig, RLConfig
from ratchet.envs.base import Environment
from ratchet.orchestrator.play import Opening, Place, Player, Sampling
from ratchet.paths import RunPaths
from ratchet.records import Manifest, RolloutFailure, Sample
from ratchet.stage import Stage
from ratchet.weights import Places

METRICS = "metrics.json"


class Played(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One rollout of an evaluation, as people read it."""

    task: str
    rollout: int
    completion: str = ""
    finish_reason: str = ""
    reward: float | None = None
    metrics: dict[str, float] = {}
    failure: RolloutFailure | None = None


def owed(paths: RunPaths, config: RLConfig) -> list[int]:
    """The steps of this run whose evaluation is due and not published yet, in order."""
    plan = config.orchestrator.eval
    if plan is None:
        return []
    due = [step for step in range(config.max_steps + 1) if plan.is_due(step, config.max_steps)]
    return [step for step in due if durable.read_committed(paths.eval(step)) is None]


def is_gone(places: Places, step: int) -> bool:
    """Whether policy `step` was published, or passed over, and is not there any more.

    The trainer publishes beside us, so what is listed is listed first: a policy that comes in between is there.
    """
    return places.is_passed(step) and not places.is_published(step)


def mean_metrics(rollouts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rollouts that have it, by name."""
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.items():
            values.setdefault(name, []).append(value)
    return {name: fmean(values[name]) for name in sorted(values)}


class Evaluator:
    """Plays and publishes evaluations."""

    def __init__(self, run: Assignment, player: Player, chat: Chat, envs: Mapping[str, Environment]) -> None:
        self._config: RLConfig = run.config
        self._run = run
        self._player = player
        self._chat = chat
        self._envs = envs

    async def play(self, config: EvalConfig, step: int) -> None:
        """Play all held-out tasks by policy `step`, publish the result, append its row."""
        started = time.monotonic()
        found: dict[str, list[Played]] = {}
        for label, env in self._envs.items():
            count = min(config.tasks, env.eval_size)
            tasks = [self._play_task(config, step, label, env, index) for index in range(count)]
            found[label] = [rollout for task in await _all(tasks) for rollout in task]
        row = _row(step, found)
        await asyncio.to_thread(_publish, self._run.stage, self._run.attempt, step, found, row)
        row["time/eval_s"] = time.monotonic() - started
        metrics.append(self._run.stage, self._run.paths.metric("evals"), row, flush=True)

    async def _play_task(
        self, config: EvalConfig, step: int, label: str, env: Environment, index: int
    ) -> list[Played]:
        opening = await self._player.open(env, index, "eval")
        if isinstance(opening, RolloutFailure):
            rollouts = range(config.rollouts_per_task)
            return [Played(task=f"eval/{index}", rollout=r, failure=opening) for r in rollouts]
        sampling = Sampling(
            seed=self._config.seed,
            max_tokens=self._config.orchestrator.sampling.max_tokens,
            temperature=config.temperature,
            policy=step,
        )
        places = [Place("eval", label, index, rollout) for rollout in range(config.rollouts_per_task)]
        results = await _all([self._player.play(opening, place, sampling) for place in places])
        return [self._played(opening, place, result) for place, result in zip(places, results, strict=True)]

    def _played(self, opening: Opening, place: Place, result: Sample | RolloutFailure) -> Played:
        if isinstance(result, RolloutFailure):
            return Played(task=opening.task.id, rollout=place.rollout, failure=result)
        said = [token for token, is_said in zip(result.token_ids, result.mask, strict=True) if is_said]
        return Played(
            task=result.task,
            rollout=result.rollout,
            completion=self._chat.decode(said),
            finish_reason=result.finish_reason,
            reward=result.reward,
            metrics=result.metrics,
        )


async def _all(calls: list[Any]) -> list[Any]:
    """Run coroutines side by side; the first exception cancels the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


def _row(step: int, found: Mapping[str, list[Played]]) -> metrics.Row:
    row: metrics.Row = {"step": step}
    for label, rollouts in found.items():
        scored = [rollout for rollout in rollouts if rollout.reward is not None]
        means = mean_metrics({"reward": r.reward or 0.0, **r.metrics} for r in scored)
        row |= {f"eval/{label}/{name}": value for name, value in means.items()}
        if len(scored) < len(rollouts):
            row[f"eval/{label}/failed"] = len(rollouts) - len(scored)
    return row


def _publish(
    stage: Stage, attempt: int, step: int, found: Mapping[str, list[Played]], row: metrics.Row
) -> None:
    directory = stage.begin(f"eval_{step}")
    for label, rollouts in found.items():
        (directory / f"{label}.json").write_bytes(msgspec.json.format(msgspec.json.encode(rollouts)))
    (directory / METRICS).write_bytes(msgspec.json.encode(row))
    manifest = Manifest(kind="eval", step=step, attempt=attempt, files=tuple(durable.seal(directory)))
    stage.commit(directory, stage.paths.eval(step), manifest)
