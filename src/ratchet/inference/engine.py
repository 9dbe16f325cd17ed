"""Continuous batching: which sequence is in which slot, what it has said, and when it is finished.

Pure bookkeeping around `SlotModel`, for one thread. A step admits what waits into free slots, then decodes
once, over as few of the first slots as the model allows.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch

from ratchet.inference.sampling import draw_uniforms, sample
from ratchet.inference.slots import Prefilled, SlotModel

T = TypeVar("T")
ADMITTED_AT_ONCE = 64
FRESH = "default"
"""The version of a server that nobody has given weights to: vLLM's word."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a completion were sampled by one version of the weights."""

    version: str
    start: int
    end: int


@dataclass(eq=False)
class Sequence:
    """One prompt and its completion. The engine appends to it; `on_finish` is called once, by the worker."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    on_finish: "Callable[[Sequence], None]" = lambda sequence: None

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    finish_reason: str | None = None
    stopped_by: str | None = None
    """The stop string that ended it, if one did."""

    def append(self, token: int, logprob: float, version: str) -> None:
        at = len(self.token_ids)
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self.spans and self.spans[-1].version == version:
            self.spans[-1] = Span(version, self.spans[-1].start, at + 1)
        else:
            self.spans.append(Span(version, at, at + 1))


def _split(values: list[T]) -> list[list[T]]:
    """Parts that are sampled at once: the distribution over a large vocabulary takes memory."""
    return [values[i : i + ADMITTED_AT_ONCE] for i in range(0, len(values), ADMITTED_AT_ONCE)]


class Engine:
    """The slots of one model and the sequences in them."""

    def __init__(self, slot_model: SlotModel, decode_text: Callable[[list[int]], str]) -> None:
        self.model = slot_model
        self.version = FRESH
        self.waiting: deque[Sequence] = deque()
        self.active: dict[int, Sequence] = {}
        self.tokens_sampled = 0
        self._finished: list[Sequence] = []
        self._decode_text = decode_text
        slots = slot_model.slots
        self._free = list(range(slots))  # a heap: sequences gather in the first slots
        self._prompts: OrderedDict[tuple[int, ...], Prefilled] = OrderedDict()
        self._prompts_kept = min(16, max(1, slots // 8))
        self._tokens_S = np.zeros(slots, dtype=np.int64)
        self._positions_S = np.zeros(slots, dtype=np.int64)
        self._temperatures_S = np.ones(slots)
        self._uniforms_SL = np.zeros((slots, slot_model.max_model_len))

    @property
    def has_work(self) -> bool:
        return bool(self.active or self.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt must leave room for one token at least."""
        room = self.model.max_model_len - len(sequence.prompt)
        sequence.max_tokens = min(sequence.max_tokens, room)
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence that nobody waits for any more."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        for slot, other in list(self.active.items()):
            if other is sequence:
                self._release(slot)

    def abort(self) -> list[Sequence]:
        """Finish everything with what it has; what that was."""
        sequences = [*self.active.values(), *self.waiting]
        for slot in list(self.active):
            self._release(slot)
        self.waiting.clear()
        for sequence in sequences:
            sequence.finish_reason = "abort"
        return sequences

    def step(self) -> list[Sequence]:
        """Admit what fits, then sample one token in every slot that is in use; what is finished by that."""
        self._finished = []
        while self.waiting and self._free:
            count = min(len(self.waiting), len(self._free))
            self._admit([self.waiting.popleft() for _ in range(count)])
        if self.active:
            self._decode()
        return self._finished

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.has_work:
            self.step()

    def adopt(self, copy: Callable[[], None], version: str) -> None:
        """Change the weights in place. Sequences in flight keep their cache and continue on the new weights."""
        self.forget_prompts()
        with torch.no_grad():
            copy()
        self.version = version

    def forget_prompts(self) -> None:
        self._prompts.clear()

    def recompute(self) -> None:
        """Compute the cache of every sequence in flight again, with the weights of now."""
        for slot, sequence in self.active.items():
            self.model.place([slot], self.model.prefill([*sequence.prompt, *sequence.token_ids[:-1]]))

    def _prefill(self, prompt: list[int]) -> Prefilled:
        """Rollouts of one task share their prompt: what is kept has the bits that computing it again would have."""
        key = tuple(prompt)
        if key not in self._prompts:
            self._prompts[key] = self.model.prefill(prompt)
        self._prompts.move_to_end(key)
        if len(self._prompts) > self._prompts_kept:
            self._prompts.popitem(last=False)
        return self._prompts[key]

    def _admit(self, sequences: list[Sequence]) -> None:
        """Move sequences into free slots and draw the first token of each. Rows do not meet in `sample`."""
        slots, logits = [], []
        for prompt, siblings in groupby(sequences, key=lambda sequence: sequence.prompt):
            prefilled = self._prefill(prompt)
            places = [self._take(sequence) for sequence in siblings]
            self.model.place(places, prefilled)
            slots += places
            logits += [prefilled.logits_1V] * len(places)
        for some, part in zip(_split(slots), _split(logits), strict=True):
            temperatures_N, uniforms_N = self._chances(some)
            self._tell(some, *sample(torch.cat(part), temperatures_N, uniforms_N))

    def _take(self, sequence: Sequence) -> int:
        """Give a sequence a free slot."""
        slot = heapq.heappop(self._free)
        self.active[slot] = sequence
        self._positions_S[slot] = len(sequence.prompt)
        self._temperatures_S[slot] = sequence.temperature
        self._uniforms_SL[slot] = draw_uniforms(sequence.seed, self.model.max_model_len)
        return slot

    def _decode(self) -> None:
        rows = self.model.rows(len(self.active))
        self._gather(rows)
        slots = list(range(rows))
        tokens_R, positions_R = (
            torch.from_numpy(array[:rows]) for array in (self._tokens_S, self._positions_S)
        )
        drawn = self.model.sample(tokens_R, positions_R, *self._chances(slots))
        for slot in self.active:
            self._positions_S[slot] += 1
        self._tell(slots, *drawn)

    def _gather(self, rows: int) -> None:
        """Move the sequences of the last slots into free ones among the first `rows`."""
        for source in [slot for slot in self.active if slot >= rows]:
            target = heapq.heappop(self._free)
            self.model.move(source, target)
            for array in (self._tokens_S, self._positions_S, self._temperatures_S, self._uniforms_SL):
                array[target] = array[source]
            self.active[target] = self.active[source]
            self._release(source)

    def _chances(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Temperature and next uniform draw of each slot. Shapes: -> (N,) float64, (N,) float64"""
        drawn = [len(self.active[slot].token_ids) if slot in self.active else 0 for slot in slots]
        return torch.from_numpy(self._temperatures_S[slots]), torch.from_numpy(
            self._uniforms_SL[slots, drawn]
        )

    def _tell(self, slots: list[int], tokens_N: torch.Tensor, logprobs_N: torch.Tensor) -> None:
        """Append what was drawn to the sequences in the given slots."""
        for slot, token, logprob in zip(slots, tokens_N.tolist(), logprobs_N.tolist(), strict=True):
            if slot in self.active:
                self._advance(slot, token, logprob)

    def _advance(self, slot: int, token: int, logprob: float) -> None:
        sequence = self.active[slot]
        self.tokens_sampled += 1
        if not np.isfinite(logprob):
            reason = "error"
        else:
            sequence.append(token, logprob, self.version)
            self._tokens_S[slot] = token
            reason = self._reason_to_stop(sequence)
        if reason is not None:
            self._release(slot)
            sequence.finish_reason = reason
            self._finished.append(sequence)

    def _reason_to_stop(self, sequence: Sequence) -> str | None:
        if sequence.token_ids[-1] in sequence.stop_token_ids:
            return "stop"
        if sequence.stop:
            text = self._decode_text(sequence.token_ids)
            sequence.stopped_by = next((stop for stop in sequence.stop if stop in text), None)
            if sequence.stopped_by is not None:
                return "stop"
        return "length" if len(sequence.token_ids) >= sequence.max_tokens else None

    def _release(self, slot: int) -> None:
        del self.active[slot]
        heapq.heappush(self._free, slot)
        self._tokens_S[slot] = self._positions_S[slot] = 0
        self._temperatures_S[slot] = 1.0
        self._uniforms_SL[slot] = 0.0
