"""One row of demonstrations as a conversation: in the four shapes that data comes in, or what is wrong with it.

messages                     [{role, content}, ...]
prompt, completion           each a text, or a list of messages
conversations                ShareGPT: [{from, value}, ...]
instruction, input, output   Alpaca: instruction and input are what the user says
"""

from typing import Any

from ratchet.chat import Message
from ratchet.errors import Refusal

Row = dict[str, Any]
MESSAGES, PAIR, SHAREGPT, ALPACA = (
    "`messages`",
    "`prompt` and `completion`",
    "ShareGPT's `conversations`",
    "Alpaca's `instruction`, `input` and `output`",
)
_COLUMNS = {
    MESSAGES: ("messages",),
    PAIR: ("prompt", "completion"),
    SHAREGPT: ("conversations",),
    ALPACA: ("instruction", "output"),
}
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
"""Who speaks in ShareGPT's rows, as a role."""


def shape_of(row: Any, where: str) -> str:
    """Which of the shapes a row has; a column that is null is not there. Raises: Refusal"""
    if not isinstance(row, dict):
        raise Refusal(f"{where} is not an object with `messages`, or `prompt` and `completion`.")
    there = {name for name, value in row.items() if value is not None}
    for shape, columns in _COLUMNS.items():
        if there.issuperset(columns):
            return shape
    raise Refusal(
        f"{where} has neither `messages` nor `prompt` and `completion`; it has {sorted(map(str, there))}: rename its "
        f"columns to one of {', '.join(_COLUMNS)}."
    )


def messages_of(row: Any, where: str) -> list[Message]:
    """The conversation of one row. Raises: Refusal saying where and what is wrong."""
    shape = shape_of(row, where)
    if shape == MESSAGES:
        messages = _listed(row["messages"], f"{where}: `messages`")
    elif shape == PAIR:
        messages = [*_said(row, "prompt", "user", where), *_said(row, "completion", "assistant", where)]
    elif shape == SHAREGPT:
        turns = _listed(row["conversations"], f"{where}: `conversations`")
        messages = [*_system(row), *(_turn(turn, where) for turn in turns)]
    else:
        messages = _alpaca(row, where)
    for number, message in enumerate(messages, start=1):
        _check(message, f"{where}: message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise Refusal(f"{where} has no assistant message, so there is nothing to learn from it.")
    return messages


def _check(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise Refusal(f"{where} must be an object with a `role` and a `content`; it is {message!r:.100}.")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise Refusal(
                f"{where}: every message needs a `role` and a `content`, both text; `{key}` is "
                f"{message.get(key)!r:.100}."
            )


def _listed(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refusal(f"{what} must be a list of messages; it is {value!r:.100}.")
    return value


def _said(row: Row, key: str, role: str, where: str) -> list[Any]:
    value = row[key]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Refusal(f"{where}: `{key}` must be a text or a list of messages; it is {value!r:.100}.")
    return value


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or "role" in turn:
        return turn
    speaker = turn.get("from")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise Refusal(
            f"{where}: `from` must be one of {', '.join(_SPEAKERS)}; it is {speaker!r:.100}: write the row as "
            "`messages`."
        )
    return {"role": role, "content": turn.get("value")}


def _alpaca(row: Row, where: str) -> list[Message]:
    """Instruction and input, with an empty line between them, after the pairs of `history` where there are some."""
    asked, more = row["instruction"], row.get("input") or ""
    for key, value in (("instruction", asked), ("input", more), ("output", row["output"])):
        if not isinstance(value, str):
            raise Refusal(f"{where}: `{key}` must be a text; it is {value!r:.100}.")
    messages = _system(row)
    for pair in _listed(row.get("history") or [], f"{where}: `history`"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refusal(
                f"{where}: `history` must hold pairs of instruction and output; one is {pair!r:.100}."
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = f"{asked}\n\n{more}" if more else asked
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
