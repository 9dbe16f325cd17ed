"""What an answer is worth: the one thing that is yours. rl.toml names this function."""

from typing import Any


def reward(completion: str, row: dict[str, Any]) -> float:
    """The share of the answer's characters that the prompt has too; saying nothing is worth nothing."""
    if not completion:
        return 0.0
    return sum(character in row["prompt"] for character in completion) / len(completion)
