"""Demonstrations: the next rows of the shuffled epochs, rendered; rows that cannot be trained are skipped, and counted.

Order = f(seed, epoch, index): the whole state of the data is how many rows were consumed. A row that is skipped is
consumed as well, and its batch is smaller by it. Needs no torch.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass

from ratchet import durable
from ratchet.chat import Chat, UnusableMessages
from ratchet.config import DataConfig
from ratchet.errors import Refusal
from ratchet.inputs import files
from ratchet.inputs.tree import Tree
from ratchet.log import LOGGER
from ratchet.models.limits import Limits
from ratchet.records import Progress
from ratchet.rng import EpochOrder, derive
from ratchet.trainer.packing import Example
from ratchet.trainer.sft_files import Rows, is_file, load_rows, with_progress
from ratchet.trainer.sft_shapes import ALPACA, MESSAGES, PAIR, SHAREGPT, messages_of, shape_of
from ratchet.trainer.source import Batch

TOKENS_KEPT = 2**20
"""Of rows that were rendered, for later epochs: about fifty megabytes in each rank."""
FIRST_ROWS = 512
"""In the order of training: rendered before anything starts, and of so many at least `data.max_skipped` is a share."""
_NAMED = 5
"""Rows that are skipped and named one by one, in the log and in a refusal."""
_MAPPED = {
    ALPACA: "instruction and input are what the user says, output is the answer",
    SHAREGPT: "human is the user, gpt the assistant",
}


def data_inputs(data: DataConfig) -> Tree:
    """What the data is: the bytes of a file, or the rows of a data set of the hub. Raises: Refusal"""
    if is_file(data.name):
        return files.of_data(data.name)
    every = load_rows(data).rows
    rows = durable.hash_bytes(b"".join(durable.hash_bytes(_as_json(row)).encode() for row in every))
    return {"data": {"rows": rows}}


def _as_json(row: object) -> bytes:
    return json.dumps(row, sort_keys=True, default=repr).encode()


def check_data(data: DataConfig, chat: Chat, seed: int = 0, limits: Limits | None = None) -> None:
    """Load the data, see that each row is well-formed, and that the first ones can be trained.

    Raises: Refusal naming file and line if any row is malformed, or too many of the first cannot be trained.
    """
    rows = load_rows(data)
    shapes = set()
    for index, row in enumerate(with_progress(rows.rows, len(rows), f"checking {data.name}")):
        place = rows.place(index)
        shapes.add(shape_of(row, place))
        messages_of(row, place)
    for shape in sorted(shapes - {MESSAGES, PAIR}):
        LOGGER.info("%s has %s: %s.", data.name, shape, _MAPPED[shape])
    SFTSource(data, chat, seed, limits, rows=rows, is_heard=False).look_ahead()


@dataclass(frozen=True)
class Unusable:
    """A row that cannot be trained."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class SFTSource:
    """SFT: a batch = the next rows of the shuffled epochs, whatever the size of those before it was."""

    def __init__(
        self,
        data: DataConfig,
        chat: Chat,
        seed: int,
        limits: Limits | None = None,
        *,
        rows: Rows | None = None,
        is_heard: bool = True,
    ) -> None:
        """`is_heard`: whether what is skipped is said in the log; of several ranks one says it."""
        self._data = data
        self._chat = chat
        self._limits = limits or Limits()
        self._rows = rows or load_rows(data)
        self.data_rows = len(self._rows)
        self._order = EpochOrder(derive(seed, "data"), self.data_rows)
        self._rendered: dict[int, Example] = {}
        self._room = TOKENS_KEPT
        self._unusable: dict[int, Unusable] = {}
        self._is_heard = is_heard

    def wait(self, step: int) -> bool:
        """Demonstrations are always there."""
        return True

    def read(self, done: Progress) -> Batch:
        """The next `batch_size` rows, less those that are skipped; as many more where all of them are.

        Raises: Refusal if more were skipped than `data.max_skipped` allows, or no row of the data can be trained.
        """
        examples: list[Example] = []
        read = 0
        while not examples and read < self.data_rows:
            first = done.total_samples + read
            examples += self._examples(first, self._data.batch_size)
            read += self._data.batch_size
            self._check(done.total_skipped + read - len(examples), done.total_samples + read)
        if not examples:
            raise self._refusal(f"none of the {self.data_rows} rows can be trained")
        return Batch(examples, skipped=read - len(examples))

    def look_ahead(self) -> None:
        """Render the first rows in the order of training, and say what is skipped. Raises: Refusal as `read` would"""
        ahead = min(FIRST_ROWS, self.data_rows)
        usable = len(self._examples(0, ahead))
        if usable == 0 and ahead == self.data_rows:
            raise self._refusal(f"none of the {self.data_rows} rows can be trained")
        self._check(ahead - usable, ahead)
        for unusable in list(self._unusable.values())[:_NAMED]:
            LOGGER.warning("%s: the row is skipped", unusable)
        if self._unusable:
            LOGGER.warning("%s: of the first %d rows %s", self._data.name, ahead, self._counted())

    def _examples(self, first: int, count: int) -> list[Example]:
        drawn = (self._example(first + i) for i in range(count))
        return [example for example in drawn if example is not None]

    def _check(self, skipped: int, consumed: int) -> None:
        share, rows = self._data.max_skipped, max(consumed, min(self.data_rows, FIRST_ROWS))
        if skipped <= math.floor(share * rows + 1e-9):
            return
        enough = math.ceil(100 * skipped / rows - 1e-9) / 100
        raise self._refusal(
            f"{skipped} of {rows} rows cannot be trained, more than data.max_skipped {share:g} allows",
            f", or set data.max_skipped to {enough:g} to do without them",
        )

    def _refusal(self, what: str, otherwise: str = "") -> Refusal:
        named = [str(unusable) for _, unusable in sorted(self._unusable.items())]
        named = [name.removeprefix(f"{self._data.name}, ") for name in named]
        if len(named) > _NAMED:
            named[_NAMED:] = [f"and {len(named) - _NAMED} more"]
        listed = f" ({'; '.join(named)})" if named else ""  # after a resume, those before it are not known
        return Refusal(f"{self._data.name}: {what}{listed}. Correct them{otherwise}.")

    def _example(self, draw: int) -> Example | None:
        """Of a row that cannot be trained, nothing."""
        index = self._order.row(draw) if self._data.shuffle else draw % self.data_rows
        if (known := self._rendered.get(index)) is not None:
            return known
        if index in self._unusable:
            return None
        try:
            example = self._render(index)
        except UnusableMessages as error:
            self._skip(index, str(error))
            return None
        if len(example.token_ids) <= self._room:
            self._rendered[index] = example
            self._room -= len(example.token_ids)
        return example

    def _render(self, index: int) -> Example:
        """Raises: UnusableMessages if the row cannot be trained."""
        messages = messages_of(self._rows.rows[index], self._rows.place(index))
        ids, mask = self._chat.render_training(messages)
        most = self._data.max_length
        example = Example(ids[:most], mask[:most])
        if not any(mask[1:]):
            raise UnusableMessages("no token to learn: the chat template marks none as the assistant's")
        if not example.trained_tokens:
            raise UnusableMessages(f"no token to learn: data.max_length {most} cuts the answer away")
        self._limits.check(example.token_ids)
        return example

    def _skip(self, index: int, reason: str) -> None:
        # A template may quote a text that no terminal can show.
        shown = reason.encode(errors="backslashreplace").decode().rstrip(".")[:300]
        self._unusable[index] = unusable = Unusable(self._rows.place(index), shown)
        if not self._is_heard:
            return
        count = len(self._unusable)
        if count <= _NAMED:
            LOGGER.warning("%s: the row is skipped", unusable)
        elif count & (count - 1) == 0:  # 8, 16, 32, ...
            LOGGER.warning("%s: so far %s", self._data.name, self._counted())

    def _counted(self) -> str:
        """How many rows are skipped, and why."""
        reasons = Counter(unusable.reason for unusable in self._unusable.values()).most_common()
        said = "; ".join(f"{count} of {reason}" for reason, count in reasons[:_NAMED])
        others = sum(count for _, count in reasons[_NAMED:])
        return f"{len(self._unusable)} are skipped ({said}{f'; {others} of others' if others else ''})"
