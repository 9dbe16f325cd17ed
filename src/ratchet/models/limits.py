"""What a model can take in, from its config.json. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ratchet import hub
from ratchet.chat import UnusableMessages
from ratchet.config import ModelConfig
from ratchet.models.check import read_config

_TABLED = {"gpt_neo", "opt", "biogpt"}
"""Kinds with a table of positions whose length is not called `n_positions`, as it is where there is always one."""


@dataclass(frozen=True)
class Limits:
    """Beyond them a forward pass ends with an error; None where there is no limit, or none is known."""

    vocabulary: int | None = None
    positions: int | None = None
    """Inputs of a sequence. A rotary embedding has no end."""

    def check(self, token_ids: Sequence[int]) -> None:
        """Raises: UnusableMessages if a sequence to train on is none for this model."""
        if self.vocabulary is not None and max(token_ids) >= self.vocabulary:
            raise UnusableMessages(
                f"a token that is none of the model's {self.vocabulary}: the tokenizer is another model's"
            )
        if (
            self.positions is not None and len(token_ids) - 1 > self.positions
        ):  # the last one is a target only
            raise UnusableMessages(
                f"longer than the model's {self.positions} positions: data.max_length {self.positions + 1} would cut it"
            )


def limits_of(model: ModelConfig) -> Limits:
    """Raises: Refusal"""
    stated = read_config(hub.snapshot(model.name, ["config.json"]))
    text = stated.get("text_config", stated)
    name = "max_position_embeddings" if text.get("model_type") in _TABLED else "n_positions"
    if text.get("model_type") == "mpt":
        name = "max_seq_len"
    return Limits(vocabulary=text.get("vocab_size"), positions=text.get(name))
