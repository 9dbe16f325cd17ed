"""A causal language model over static slots: one row of the key-value cache for each sequence.

Prefill runs one prompt at a time at its own length, so its bits are a function of the prompt alone. Decode runs
over all slots, or over the first so many of them where a check at the start has shown that a row's bits are the
same at that number (`rungs`). Any other number of rows would pick other kernels, and so other bits.

The cache lies in pieces of a few positions of all slots: what a step reads is then whole pieces without gaps. MKL
takes three times as long for batches of matrices with gaps between them. A GPU does not mind, and has one piece.

Axes: S slots, R rows that a step decodes, H query heads, K key-value heads, G = H / K, B = R * K, N pieces,
P positions of a piece, T = N * P, L tokens, D head size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ratchet.inference.sampling import sample
from ratchet.models.graphs import Graphs

ATTENTION = "ratchet_slots"
PIECE = 32
"""Positions of a piece on a CPU."""
SMALLEST_SPAN = 64
"""On a GPU."""
ROWS = 16
"""Rungs are multiples of it: numbers of rows at which products pick the same kernels as at all of them."""
MAX_RUNGS = 8
PROMPT_LENGTHS = (64, 128, 256, 512, 1024)
"""That prompts are padded to on a GPU: one CUDA graph each, beside one for each span of the cache that a step reads."""

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Prefilled:
    """What a prompt leaves behind: its keys and values layer by layer, and the logits of the next token."""

    layers: list[KeyValue]
    logits_1V: torch.Tensor


class PromptCache(Cache):
    """Collects the keys and values of one prompt while the model runs over it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.collected: list[KeyValue] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        self.collected.append((key_states.contiguous(), value_states.contiguous()))
        return key_states, value_states


class SlotCache(Cache):
    """Keys and values of all slots. Rows are zeroed when a sequence moves in: nothing leaks between two."""

    def __init__(self, slots: int, length: int, piece: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.length = length
        self.piece = piece
        self.rows: list[KeyValue] = []
        """Layer by layer, (N, S, K, P, D) each."""
        self._span = 0
        self._positions_R = torch.empty(0)
        self._index: dict[int, torch.Tensor] = {}

    def place(self, slots: list[int], layers: list[KeyValue]) -> None:
        """Move a prefilled prompt into slots, and zeros behind it."""
        if not self.rows:
            self.rows = [(self._empty(key), self._empty(value)) for key, value in layers]
        for row, prompt in zip(self.rows, layers, strict=True):
            for store_NSKPD, states_1KLD in zip(row, prompt, strict=True):
                image_NKPD = self._image(states_1KLD[0])
                places = [store_NSKPD[:, slot] for slot in slots]
                torch._foreach_copy_(places, [image_NKPD] * len(places))  # pyright: ignore[reportPrivateImportUsage]

    def _image(self, states_KLD: torch.Tensor) -> torch.Tensor:
        """What a slot holds that begins with these. Shapes: (K, L, D) -> (N, K, P, D)"""
        heads, _, size = states_KLD.shape
        image_NKPD = states_KLD.new_zeros(self.length // self.piece, heads, self.piece, size)
        for piece_KPD, part_KLD in zip(image_NKPD, states_KLD.split(self.piece, 1), strict=False):
            piece_KPD[:, : part_KLD.shape[1]] = part_KLD
        return image_NKPD

    def move(self, source: int, target: int) -> None:
        """Copy a slot's row to another slot."""
        stores = [store_NSKPD for row in self.rows for store_NSKPD in row]
        torch._foreach_copy_([store[:, target] for store in stores], [store[:, source] for store in stores])  # pyright: ignore[reportPrivateImportUsage]

    def aim(self, positions_R: torch.Tensor, span: int) -> None:
        """Say where the next decode step writes in the first R slots, and how many positions it reads."""
        self._positions_R = positions_R
        self._span = span
        self._index.clear()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        keys_NSKPD, values_NSKPD = self.rows[layer_idx]
        self._write(keys_NSKPD, key_states)
        self._write(values_NSKPD, value_states)
        rows = len(self._positions_R)
        return self.read(keys_NSKPD, rows, self._span), self.read(values_NSKPD, rows, self._span)

    def read(self, store_NSKPD: torch.Tensor, rows: int, span: int) -> torch.Tensor:
        """The first positions of the first slots. Shapes: -> (N, R, K, P, D), with N * P = span"""
        return store_NSKPD[: -(-span // self.piece), :rows, :, :span]

    def _write(self, store_NSKPD: torch.Tensor, states_RK1D: torch.Tensor) -> None:
        size = store_NSKPD.shape[-1]
        index, states = self._index_of(store_NSKPD.shape[2]), states_RK1D.reshape(-1, size)
        with any_order(store_NSKPD.device):
            store_NSKPD.view(-1, size).index_copy_(0, index, states)

    def _index_of(self, heads: int) -> torch.Tensor:
        """Where (slot, head, position) lies when all rows are one long list. Same for every layer of a step."""
        if heads not in self._index:
            at_R, device = self._positions_R, self._positions_R.device
            first_R = (at_R // self.piece) * self.slots + torch.arange(len(at_R), device=device)
            first_RK = first_R[:, None] * heads + torch.arange(heads, device=device)
            self._index[heads] = (first_RK * self.piece + (at_R % self.piece)[:, None]).flatten()
        return self._index[heads]

    def _empty(self, states_1KLD: torch.Tensor) -> torch.Tensor:
        _, heads, _, size = states_1KLD.shape
        return states_1KLD.new_zeros(self.length // self.piece, self.slots, heads, self.piece, size)


@contextmanager
def any_order(device: torch.device) -> Iterator[None]:
    """For writes to places that differ: torch would sort them on a GPU, so that their order is fixed."""
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def decode_attention(
    query_RH1D: torch.Tensor,
    keys_NRKPD: torch.Tensor,
    values_NRKPD: torch.Tensor,
    hidden_R11T: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """One query a slot against its row: plain products and a softmax in fp32, each slot on its own.

    Shapes: -> (R, H, 1, D)
    """
    rows, heads, _, size = query_RH1D.shape
    _, _, kv_heads, piece, _ = keys_NRKPD.shape
    query_BGD = query_RH1D.reshape(rows * kv_heads, -1, size)
    scores_NBGP = [torch.bmm(query_BGD, keys_RKPD.flatten(0, 1).transpose(1, 2)) for keys_RKPD in keys_NRKPD]
    scores_RH1T = torch.cat(scores_NBGP, -1).view(rows, heads, 1, -1) * scaling
    shares = scores_RH1T.masked_fill_(hidden_R11T, float("-inf")).softmax(-1, dtype=torch.float32)
    shares_BGT = shares.to(query_RH1D.dtype).view(rows * kv_heads, -1, shares.shape[-1])
    parts = zip(shares_BGT.split(piece, -1), (part.flatten(0, 1) for part in values_NRKPD), strict=True)
    found_BGD = torch.bmm(*next(parts))
    for shares_BGP, values_BPD in parts:
        found_BGD.baddbmm_(shares_BGP, values_BPD)
    return found_BGD.view(rows, heads, 1, -1)


def prefill_attention(
    query_1HLD: torch.Tensor,
    key_1KLD: torch.Tensor,
    value_1KLD: torch.Tensor,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    """Causal attention of one prompt, in one fixed kernel for its length. Shapes: -> (1, H, L, D)"""
    length = query_1HLD.shape[2]
    visible_LL = None
    if window is not None and window < length:
        at_L = torch.arange(length, device=query_1HLD.device)
        behind_LL = at_L[:, None] - at_L
        visible_LL = (behind_LL >= 0) & (behind_LL < window)
    return F.scaled_dot_product_attention(
        query_1HLD,
        key_1KLD,
        value_1KLD,
        attn_mask=visible_LL,
        is_causal=visible_LL is None,
        scale=scaling,
        enable_gqa=query_1HLD.shape[1] != key_1KLD.shape[1],
    )


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: no mask means prefill, a mask means decode."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        return prefill_attention(query, key, value, sliding_window, scale).transpose(1, 2), None
    hidden_R11T = attention_mask
    if sliding_window is not None:
        visible_R111 = (~hidden_R11T).sum(-1, keepdim=True)
        at_T = torch.arange(hidden_R11T.shape[-1], device=query.device)
        hidden_R11T = hidden_R11T | (at_T < visible_R111 - sliding_window)
    return decode_attention(query, key, value, hidden_R11T, scale).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class SlotModel:
    """A Hugging Face causal language model that decodes all slots at once."""

    def __init__(self, model: PreTrainedModel, slots: int, max_model_len: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        self.slots = slots
        self.max_model_len = max_model_len
        self.device = model.device
        is_cpu = self.device.type == "cpu"
        smallest = PIECE if is_cpu else SMALLEST_SPAN
        length = -(-max_model_len // smallest) * smallest
        # Sums over pieces would be rounded once a piece in bf16.
        self.cache = SlotCache(slots, length, PIECE if is_cpu and model.dtype == torch.float32 else length)
        self.spans = _spans(smallest, length, per_octave=4 if is_cpu else 1)
        self.rungs = [slots]
        """Numbers of rows that are known to give the bits of all slots, the smallest first."""
        self._graphs = Graphs()

    @torch.inference_mode()
    def prefill(self, token_ids: list[int]) -> Prefilled:
        """Run over one prompt. A pure function of the weights and the prompt."""
        length = len(token_ids)
        padded = _padded_length(length, self.cache.length) if self.device.type == "cuda" else None
        if padded is None:
            ids_1L = torch.tensor([token_ids], device=self.device)
            return self._run_prompt(ids_1L, torch.tensor([length - 1], device=self.device))
        ids_1L = torch.zeros((1, padded), dtype=torch.int64)
        ids_1L[0, :length] = torch.tensor(token_ids)
        inputs = (ids_1L, torch.tensor([length - 1]))
        found = self._graphs.run(("prefill", padded), self._run_prompt, inputs, self.device)
        layers = [(key[:, :, :length].clone(), value[:, :, :length].clone()) for key, value in found.layers]
        return Prefilled(layers, found.logits_1V.clone())

    def _run_prompt(self, ids_1L: torch.Tensor, last_1: torch.Tensor) -> Prefilled:
        """Keys and values of a prompt that may be padded at the right, and the logits after its last token."""
        cache = PromptCache()
        output = self.model(
            input_ids=ids_1L,
            position_ids=torch.arange(ids_1L.shape[1], device=ids_1L.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last_1,
        )
        return Prefilled(cache.collected, output.logits[:, -1])

    @torch.inference_mode()
    def sample(
        self,
        tokens_R: torch.Tensor,
        positions_R: torch.Tensor,
        temperatures_R: torch.Tensor,
        uniforms_R: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token to each of the first slots and draw the next. Shapes: 4 x (R,) -> (R,) int64, (R,) float64

        What comes back is overwritten by the next call.
        """
        span = self.span(int(positions_R.max()) + 1)

        def step(
            tokens_R: torch.Tensor,
            positions_R: torch.Tensor,
            temperatures_R: torch.Tensor,
            uniforms_R: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return sample(self.decode(tokens_R, positions_R, span), temperatures_R, uniforms_R)

        inputs = (tokens_R, positions_R, temperatures_R, uniforms_R)
        return self._graphs.run(("decode", len(tokens_R), span), step, inputs, self.device)

    @torch.inference_mode()
    def place(self, slots: list[int], prefilled: Prefilled) -> None:
        self.cache.place(slots, prefilled.layers)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy what a slot holds to another slot."""
        self.cache.move(source, target)

    @torch.inference_mode()
    def decode(
        self, tokens_R: torch.Tensor, positions_R: torch.Tensor, span: int | None = None
    ) -> torch.Tensor:
        """Append one token to each of the first slots, at its position. Shapes: (R,), (R,) int64 -> (R, V)"""
        tokens_R, positions_R = tokens_R.to(self.device), positions_R.to(self.device)
        span = span or self.span(int(positions_R.max()) + 1)
        self.cache.aim(positions_R, span)
        hidden_RT = torch.arange(span, device=self.device) > positions_R[:, None]
        output = self.model(
            input_ids=tokens_R[:, None],
            position_ids=positions_R[:, None],
            past_key_values=self.cache,
            attention_mask=hidden_RT[:, None, None],
            use_cache=True,
        )
        return output.logits[:, -1]

    def span(self, length: int) -> int:
        """How many cache positions a step reads: as few as hold the longest row."""
        return next(span for span in self.spans if span >= length)

    def rows(self, count: int) -> int:
        """How many rows a step decodes so that `count` sequences fit."""
        return next(rung for rung in self.rungs if rung >= count)


def possible_rungs(slots: int) -> list[int]:
    """Numbers of rows below all slots that are worth a try: at most a few, so that trying them takes no time."""
    step = max(ROWS, -(-slots // (MAX_RUNGS * ROWS)) * ROWS)
    return list(range(step, slots, step))


def _spans(smallest: int, longest: int, *, per_octave: int) -> list[int]:
    """Lengths to read, from the smallest to the longest, at most so many from one length to its double."""
    spans = [smallest]
    while spans[-1] < longest:
        octave = 1 << (spans[-1] // smallest).bit_length() - 1
        spans.append(min(spans[-1] + smallest * max(1, octave // per_octave), longest))
    return spans


def _padded_length(length: int, longest: int) -> int | None:
    """The length that a prompt is padded to; None if it runs at its own."""
    return next((padded for padded in PROMPT_LENGTHS if length <= padded <= longest), None)
