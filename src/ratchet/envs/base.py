"""What an environment is: tasks, the first messages of each, and what follows the model's answer.

An environment is immutable after construction. Whatever one rollout needs to remember is in its transcript,
so that thousands of rollouts share one environment and a rollout can be played again from nothing.
Each method may be a coroutine.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from os import PathLike
from typing import Any, Literal, TypeVar, cast

import msgspec

from ratchet.records import RolloutFailure

Message = dict[str, Any]
Split = Literal["train", "eval"]
T = TypeVar("T")


class Task(msgspec.Struct, frozen=True):
    """One problem. `id` names it in batches and in the ledger; `data` is the environment's own."""

    id: str
    data: Any = None


class Transcript(msgspec.Struct, frozen=True):
    """A conversation that ends with the model's newest answer."""

    messages: tuple[Message, ...]
    finish_reason: str
    """`stop`, or `length` when the newest answer was cut."""

    @property
    def completion(self) -> str:
        return self.messages[-1]["content"]


class Score(msgspec.Struct, frozen=True):
    """The end of a rollout. A metric is averaged over the rollouts that have it."""

    reward: float
    metrics: dict[str, float] = {}


StepResult = Score | RolloutFailure | Sequence[Message]


class Environment(ABC):
    """Constructed with `EnvConfig.args` as keyword arguments; raises Refusal for arguments it cannot use."""

    inputs: Sequence[str | PathLike[str]] = ()
    """The files and directories that it reads, relative to the working directory: a run goes on only with the same
    content. Set in the class or in the constructor."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many training tasks there are."""

    @property
    def eval_size(self) -> int:
        """How many held-out tasks there are."""
        return 0

    @abstractmethod
    def task(self, index: int, split: Split) -> Task | Awaitable[Task]:
        """Task `index` of a split; the same index is always the same task."""

    @abstractmethod
    def messages(self, task: Task) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """The conversation up to the model's first answer."""

    @abstractmethod
    def step(self, task: Task, transcript: Transcript) -> StepResult | Awaitable[StepResult]:
        """What follows an answer: further messages, a score, or a failure that is never trained on."""


async def settle(value: T | Awaitable[T]) -> T:
    """The value of a plain method, or of one that is a coroutine."""
    return await value if inspect.isawaitable(value) else cast(T, value)
