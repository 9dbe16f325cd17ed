"""Demonstrations: rows of `messages`, or of `prompt` and `completion`, from JSONL, Parquet or the hub.

Order = f(seed, epoch, index): the whole state of the data is how many rows were trained. Needs no torch.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ratchet import durable, hub
from ratchet.chat import Chat, Message
from ratchet.config import DataConfig
from ratchet.errors import Refusal
from ratchet.inputs import files
from ratchet.inputs.tree import Tree
from ratchet.records import Progress
from ratchet.rng import EpochOrder, derive
from ratchet.trainer.packing import Example
from ratchet.trainer.source import Batch

Row = dict[str, Any]
TOKENS_KEPT = 2**20
"""Of rows that were rendered, for later epochs: about fifty megabytes in each rank."""


def data_inputs(data: DataConfig) -> Tree:
    """What the data is: the bytes of a file, or the rows of a data set of the hub. Raises: Refusal"""
    if Path(data.name).is_file() or hub.is_local(data.name):
        return files.of_data(data.name)
    rows = durable.hash_bytes(b"".join(durable.hash_bytes(_as_json(row)).encode() for row in load_rows(data)))
    return {"data": {"rows": rows}}


def _as_json(row: Row) -> bytes:
    return json.dumps(row, sort_keys=True, default=repr).encode()


def check_data(data: DataConfig, chat: Chat) -> None:
    """Load the data, from the hub too, and see that its first row can be learnt.

    Raises: Refusal naming file and line if any local row is malformed.
    """
    rows = load_rows(data)
    ids, mask = chat.render_training(messages_of(rows[0], f"{data.name}, row 1"))
    if not any(mask[1:]):
        raise Refusal(
            f"{data.name}, row 1 has no token to learn from ({len(ids)} tokens, none of the assistant's)."
        )


def load_rows(data: DataConfig) -> Sequence[Row]:
    """All rows, each checked. Raises: Refusal with file and line."""
    path = Path(data.name)
    if path.suffix == ".jsonl":
        rows: Sequence[Row] = list(_read_jsonl(path))
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif hub.is_local(data.name):
        raise Refusal(f"{path} is not a .jsonl or .parquet file or a hub name: check data.name.")
    else:
        return _read_hub(data)
    if not rows:
        raise Refusal(f"{path} has no rows.")
    return rows


def _open_refusal(path: Path, error: Exception) -> Refusal:
    return Refusal(f"The data file {path} cannot be read ({error}): check data.name.")


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _open_refusal(path, error) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refusal(f"{where} is not valid JSON: {error}.") from None
        messages_of(row, where)
        yield row


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise _open_refusal(path, error) from None
    for number, row in enumerate(rows, start=1):
        messages_of(row, f"{path}, row {number}")
    return rows


def _read_hub(data: DataConfig) -> Sequence[Row]:
    from datasets import load_dataset

    try:
        return load_dataset(data.name, split=data.split)  # pyright: ignore[reportReturnType]
    except Exception as error:  # the library raises many kinds for a name that does not exist
        raise Refusal(f"The data set {data.name} ({data.split}) cannot be loaded: {error}.") from None


def messages_of(row: Any, where: str) -> list[Message]:
    """The conversation of one row. Raises: Refusal saying where and what is wrong."""
    if not isinstance(row, dict):
        raise Refusal(f"{where} is not an object with `messages`, or `prompt` and `completion`.")
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "completion" in row:
        messages = [*_as_messages(row["prompt"], "user"), *_as_messages(row["completion"], "assistant")]
    else:
        raise Refusal(
            f"{where} has neither `messages` nor `prompt` and `completion`; it has {sorted(map(str, row))}."
        )
    is_sound = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not is_sound:
        raise Refusal(f"{where}: every message needs a `role` and a `content`, both text.")
    if not any(m["role"] == "assistant" for m in messages):
        raise Refusal(f"{where} has no assistant message, so there is nothing to learn from it.")
    return messages


def _as_messages(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value or []


class SFTSource:
    """SFT: a batch = the next rows of the shuffled epochs, whatever the size of those before it was."""

    def __init__(self, data: DataConfig, chat: Chat, seed: int) -> None:
        self._data = data
        self._chat = chat
        self._rows = load_rows(data)
        self.data_rows = len(self._rows)
        self._order = EpochOrder(derive(seed, "data"), self.data_rows)
        self._rendered: dict[int, Example] = {}
        self._room = TOKENS_KEPT

    def wait(self, step: int) -> bool:
        """Demonstrations are always there."""
        return True

    def read(self, done: Progress) -> Batch:
        """Raises: Refusal if no token of the batch can be learnt."""
        first = done.total_samples
        batch = Batch([self._example(first + i) for i in range(self._data.batch_size)])
        if not batch.trained_tokens:
            raise Refusal(
                f"Batch {done.step} has no token to learn from: data.max_length {self._data.max_length} cuts every "
                "answer away, or the chat template marks none."
            )
        return batch

    def _example(self, draw: int) -> Example:
        index = self._order.row(draw) if self._data.shuffle else draw % self.data_rows
        if (known := self._rendered.get(index)) is not None:
            return known
        example = self._render(index)
        if len(example.token_ids) <= self._room:
            self._rendered[index] = example
            self._room -= len(example.token_ids)
        return example

    def _render(self, index: int) -> Example:
        messages = messages_of(self._rows[index], f"{self._data.name}, row {index + 1}")
        ids, mask = self._chat.render_training(messages)
        return Example(ids[: self._data.max_length], mask[: self._data.max_length])
