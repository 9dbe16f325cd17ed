"""One rollout: the prompt is rendered once, tokens go in and come out, the environment has the last word.

Nothing is ever tokenised again: the prompt of a further turn is the tokens so far plus the rendering of the
new messages. A failure is a value with a reason, never a reward of 0.
"""

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec
import numpy as np

from ratchet.chat import Chat, UnusableMessages
from ratchet.envs.base import Environment, Message, Score, Split, StepResult, Task, Transcript, settle
from ratchet.envs.importing import frames, told
from ratchet.errors import RatchetError
from ratchet.inputs.seen import Guard
from ratchet.inputs.tree import InputChanged
from ratchet.log import LOGGER
from ratchet.orchestrator.calls import Completion, Request
from ratchet.orchestrator.pool import Pool, Strange
from ratchet.records import RolloutFailure, Sample, VersionSpan
from ratchet.rng import derive

T = TypeVar("T")

ENV_ERROR = "env_error"
BAD_SCORE = "bad_score"
TOO_LONG = "too_long"
EMPTY = "empty"
_ERRORS_SHOWN = 10
LARGEST_REWARD = 1e12
"""An advantage is as large, and so is the gradient: the squares in its norm, in float32, end at 3e38."""
LARGEST_METRIC = 1e150
"""Metrics are only averaged, in float64: sums of so many end at 1e308, and their squares do, too."""


class Place(NamedTuple):
    """Where a rollout belongs; its seeds follow from nothing else."""

    domain: Literal["rollout", "eval"]
    env: str
    draw: int
    rollout: int


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the answers of a rollout are sampled. `policy` demands that one policy samples every token."""

    seed: int
    max_tokens: int
    temperature: float
    policy: int | None = None


class Opening(msgspec.Struct, frozen=True):
    """What all rollouts of a task share: rendered once."""

    env: Environment
    task: Task
    messages: tuple[Message, ...]
    token_ids: list[int]


class Tokens(msgspec.Struct):
    """The context of a rollout as it grows."""

    ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[VersionSpan]

    def add_context(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.mask.extend([False] * len(ids))
        self.logprobs.extend([0.0] * len(ids))

    def add_answer(self, answer: Completion, steps: Sequence[int]) -> None:
        start = len(self.ids)
        self.ids.extend(answer.token_ids)
        self.mask.extend([True] * len(answer.token_ids))
        self.logprobs.extend(answer.logprobs)
        for span, step in zip(answer.versions, steps, strict=True):
            if span.end > span.start:
                self.versions.append(VersionSpan(step, start + span.start, start + span.end))


class Player:
    """Plays rollouts against the servers; one whose tokens are not ours is played again `replays` times at most.

    `running` rollouts are being played; `play_s` and `env_s` are the seconds that finished rollouts took, all
    together, and those of them that were spent in the environment's own code.
    """

    def __init__(self, chat: Chat, pool: Pool, guard: Guard, *, seed: int, replays: int) -> None:
        self._chat = chat
        self._pool = pool
        self._guard = guard
        self._seed = seed
        self._replays = replays
        self._errors_seen = 0
        self.running = 0
        self.play_s = 0.0
        self.env_s = 0.0

    async def open(self, env: Environment, index: int, split: Split) -> Opening | RolloutFailure:
        """Render the prompt of a task, for all its rollouts."""

        async def first_messages() -> tuple[Task, tuple[Message, ...]]:
            task = await settle(env.task(index, split))
            return task, tuple(await settle(env.messages(task)))

        found = await self._call(first_messages, f"{split} task {index}", "open", split, index)
        if isinstance(found, RolloutFailure):
            return found
        task, messages = found
        try:
            return Opening(env, task, messages, self._chat.render(messages))
        except UnusableMessages as error:
            return self._refused(f"{split} task {index}", error)

    async def play(self, opening: Opening, place: Place, sampling: Sampling) -> Sample | RolloutFailure:
        """One rollout to its score. Played again, with the same seeds, if the server held other weights."""
        started = time.perf_counter()
        self.running += 1
        try:
            return await self._play_until_ours(opening, place, sampling)
        finally:
            self.running -= 1
            self.play_s += time.perf_counter() - started

    async def _play_until_ours(
        self, opening: Opening, place: Place, sampling: Sampling
    ) -> Sample | RolloutFailure:
        for _ in range(self._replays + 1):
            try:
                return await self._play_once(opening, place, sampling)
            except Strange:
                continue
        raise RatchetError(
            f"Inference keeps answering with other weights than policy {self._pool.target.step}: "
            "another program gives it weights too; use servers of their own for each run."
        )

    async def _play_once(self, opening: Opening, place: Place, sampling: Sampling) -> Sample | RolloutFailure:
        tokens = Tokens([], [], [], [])
        tokens.add_context(opening.token_ids)
        messages, turn = opening.messages, 0
        group = place[:-1]
        while True:
            room = self._room(tokens, sampling)
            if room < 1:
                return RolloutFailure(
                    TOO_LONG, f"turn {turn}: no room for a token in the server's max_model_len"
                )
            seed = derive(sampling.seed, *place, turn)
            answer = await self._answer(tokens, seed, room, sampling, group)
            if not answer.token_ids:
                return RolloutFailure(EMPTY, "the answer has no tokens")
            messages = (*messages, self._message(answer))
            transcript = Transcript(messages, answer.finish_reason)
            result = await self._step(opening, transcript, (*place, turn))
            if isinstance(result, RolloutFailure):
                return result
            if isinstance(result, Score):
                return _sample(opening.task, place, tokens, result, answer.finish_reason)
            is_closed = answer.finish_reason == "stop"
            try:
                tokens.add_context(self._chat.render_more(messages, result, is_closed=is_closed))
            except UnusableMessages as error:
                return self._refused(f"task {opening.task.id}", error)
            messages, turn = (*messages, *result), turn + 1

    def _room(self, tokens: Tokens, sampling: Sampling) -> int:
        """Tokens that the next answer may have: less than what is asked for where the context is near the limit."""
        limit = self._pool.max_model_len
        return sampling.max_tokens if limit is None else min(sampling.max_tokens, limit - len(tokens.ids))

    async def _answer(
        self, tokens: Tokens, seed: int, room: int, sampling: Sampling, group: tuple[object, ...]
    ) -> Completion:
        """Sample one answer and append it. Raises: Strange if any token is not by a policy of ours."""
        request = Request(
            token_ids=tokens.ids,
            seed=seed,
            max_tokens=room,
            temperature=sampling.temperature,
            stop_token_ids=self._chat.stop_token_ids,
        )
        answer, steps = await self._pool.generate(request, group, sampling.policy)
        tokens.add_answer(answer, steps)
        return answer

    def _message(self, answer: Completion) -> Message:
        return {"role": "assistant", "content": self._chat.decode(answer.token_ids)}

    async def _step(self, opening: Opening, transcript: Transcript, at: tuple[int | str, ...]) -> StepResult:
        async def step() -> StepResult:
            result = await settle(opening.env.step(opening.task, transcript))
            if isinstance(result, Score):
                metrics = {name: float(value) for name, value in result.metrics.items()}
                return Score(float(result.reward), metrics)
            if isinstance(result, RolloutFailure):
                return result
            if not isinstance(result, Sequence) or isinstance(result, str) or not result:
                raise TypeError(f"step returned {result!r}: no score, no failure, no messages")
            return list(result)

        result = await self._call(step, f"task {opening.task.id}", *at)
        return usable(result) if isinstance(result, Score) else result

    async def _call(self, call: Callable[[], Awaitable[T]], what: str, *at: int | str) -> T | RolloutFailure:
        """Run an environment's own code: whatever it raises is the rollout's failure, not the program's.

        Chance in it is a function of the place. Raises: InputChanged for a module that is not what it was
        """
        started = time.perf_counter()
        _fix_chance(derive(self._seed, "env", *at))
        try:
            return await call()
        except InputChanged:
            raise
        except Exception as error:
            return self._refused(what, error)
        finally:
            self.env_s += time.perf_counter() - started
            self._guard.check()

    def _refused(self, what: str, error: Exception) -> RolloutFailure:
        """Count a failure of an environment's, and say the first ones."""
        self._errors_seen += 1
        if self._errors_seen <= _ERRORS_SHOWN:
            LOGGER.warning("the environment failed on %s: %s%s", what, told(error), frames(error))
        return RolloutFailure(ENV_ERROR, repr(error))


def _fix_chance(seed: int) -> None:
    """What user code draws from the modules `random` and `numpy.random`; coroutines share it after their first wait."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


S = TypeVar("S", Score, Sample)


def usable(scored: S) -> S | RolloutFailure:
    """What was scored, or a failure if no batch could be made of its numbers."""
    are_small = all(abs(value) <= LARGEST_METRIC for value in scored.metrics.values())
    if abs(scored.reward) <= LARGEST_REWARD and are_small:
        return scored
    return RolloutFailure(
        BAD_SCORE,
        f"reward {scored.reward}, metrics {scored.metrics}: a reward is a number within {LARGEST_REWARD:g} of 0, "
        f"a metric one within {LARGEST_METRIC:g}",
    )


def _sample(task: Task, place: Place, tokens: Tokens, score: Score, finish_reason: str) -> Sample:
    return Sample(
        env=place.env,
        task=task.id,
        draw=place.draw,
        rollout=place.rollout,
        token_ids=tokens.ids,
        mask=tokens.mask,
        logprobs=tokens.logprobs,
        versions=tokens.versions,
        reward=score.reward,
        advantage=0.0,
        finish_reason=finish_reason,
        metrics=score.metrics,
    )
