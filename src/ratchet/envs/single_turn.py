"""Environments of one question and one answer: rows of a file and a function that scores an answer."""

import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from ratchet.envs import data
from ratchet.envs.base import Environment, Message, Score, Split, Task, Transcript
from ratchet.envs.data import Row
from ratchet.envs.importing import import_object
from ratchet.errors import Refusal

Reward = float | dict[str, float]
RewardFunction = Callable[[str, Row], Reward | Awaitable[Reward]]


class SingleTurn(Environment):
    """Rows of two files; a subclass says how a row is asked and how an answer is scored."""

    def __init__(self, train: str, held_out: str | None, check: data.Check) -> None:
        self.inputs = [train] if held_out is None else [train, held_out]
        self._rows: dict[Split, list[Row]] = {
            "train": data.read_rows(train, check),
            "eval": data.read_rows(held_out, check) if held_out is not None else [],
        }

    @property
    def size(self) -> int:
        return len(self._rows["train"])

    @property
    def eval_size(self) -> int:
        return len(self._rows["eval"])

    def task(self, index: int, split: Split) -> Task:
        return Task(id=f"{split}/{index}", data=self._rows[split][index])

    def messages(self, task: Task) -> Sequence[Message]:
        return self.ask(task.data)

    def step(self, task: Task, transcript: Transcript) -> Score | Awaitable[Score]:
        return self.score(transcript.completion, task.data)

    @abstractmethod
    def ask(self, row: Row) -> Sequence[Message]:
        """The messages that put one row to the model."""

    @abstractmethod
    def score(self, completion: str, row: Row) -> Score | Awaitable[Score]:
        """What an answer to one row is worth."""


class Rows(SingleTurn):
    """`id = "rows"`: rows with `prompt` (or `messages`), scored by a function of your own.

    The function gets (completion, row) and returns the reward, or a dict with `reward` and metrics.
    """

    def __init__(
        self, *, data: str, reward: str, eval_data: str | None = None, system: str | None = None
    ) -> None:
        super().__init__(data, eval_data, _wrong_row)
        function = import_object(reward, "reward", "a function with the arguments (completion, row)")
        if not callable(function):
            raise Refusal(f"reward = {reward!r} is not a function: it must take (completion, row).")
        _check_signature(reward, function)
        self._reward = cast(RewardFunction, function)
        self._system = system

    def ask(self, row: Row) -> Sequence[Message]:
        head = [{"role": "system", "content": self._system}] if self._system is not None else []
        if "messages" not in row:
            return [*head, {"role": "user", "content": row["prompt"]}]
        messages = row["messages"]
        return [*head, *(messages[:-1] if messages[-1]["role"] == "assistant" else messages)]

    def score(self, completion: str, row: Row) -> Score | Awaitable[Score]:
        result = self._reward(completion, row)
        return _scored_later(result) if inspect.isawaitable(result) else _scored(result)


async def _scored_later(result: Awaitable[Reward]) -> Score:
    return _scored(await result)


def _scored(result: Any) -> Score:
    if not isinstance(result, dict):
        return Score(float(result))
    metrics = {name: float(value) for name, value in result.items() if name != "reward"}
    return Score(float(result["reward"]), metrics)


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    """Raises: Refusal if the function cannot be called as it will be"""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of C code, say: it does not tell
    try:
        signature.bind("", {})
    except TypeError as error:
        raise Refusal(
            f"reward = {name!r} takes {signature}, but is called with (completion, row), the text of one answer and "
            f"its task's row ({error}): give it these two arguments."
        ) from None


def _wrong_row(row: Row) -> str | None:
    if "messages" not in row:
        return data.missing_text(row, "prompt")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "`messages` must be a list of at least one message"
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return "each of `messages` must have `role` and `content`"
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return "`messages` must hold more than the assistant's answer"
    return None
