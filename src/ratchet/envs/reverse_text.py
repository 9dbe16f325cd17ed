"""The smallest environment that teaches something: say a text backwards."""

import difflib
from collections.abc import Sequence

from ratchet.envs.base import Message, Score
from ratchet.envs.data import Row, missing_text
from ratchet.envs.single_turn import SingleTurn

REFUSAL = "i do not know"


class ReverseText(SingleTurn):
    """`id = "reverse_text"`: rows {"text": ...}; the reward is the similarity to the reversed text.

    `refused` counts the answer "i do not know"; `answered_reward` is the reward of the other answers only.
    """

    def __init__(self, *, data: str, eval_data: str | None = None, system: str | None = None) -> None:
        super().__init__(data, eval_data, lambda row: missing_text(row, "text"))
        self._system = system

    def ask(self, row: Row) -> Sequence[Message]:
        head = [{"role": "system", "content": self._system}] if self._system is not None else []
        return [*head, {"role": "user", "content": row["text"]}]

    def score(self, completion: str, row: Row) -> Score:
        reward = difflib.SequenceMatcher(None, completion, row["text"][::-1]).ratio()
        if completion == REFUSAL:
            return Score(reward, {"refused": 1.0})
        return Score(reward, {"refused": 0.0, "answered_reward": reward})
