"""A causal language model over static slots: one row of the key-value cache for each sequence.

Prefill runs one prompt at a time at its own length, so its bits are a function of the prompt alone. Decode
always runs over all slots: the shape never changes, so neither do the kernels, and a row's bits do not depend
on which other rows are in use. Compacting the batch to the active rows would break that.

Axes: S slots, H query heads, K key-value heads, G = H / K, T cache positions, L tokens, D head size,
V vocabulary.
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

from ratchet.inference.graphs import Graphs, padded_length
from ratchet.inference.sampling import sample

ATTENTION = "ratchet_slots"
SMALLEST_SPAN = 64

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

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.length = length
        self.rows: list[KeyValue] = []
        self._span = 0
        self._positions_S = torch.empty(0)
        self._index: dict[int, torch.Tensor] = {}

    def place(self, slot: int, layers: list[KeyValue]) -> None:
        """Move a prefilled prompt into a slot."""
        if not self.rows:
            self.rows = [(self._empty(key), self._empty(value)) for key, value in layers]
        pairs = [
            (store_SKTD[slot], states_1KLD[0])
            for row, prompt in zip(self.rows, layers, strict=True)
            for store_SKTD, states_1KLD in zip(row, prompt, strict=True)
        ]
        torch._foreach_zero_([store_KTD for store_KTD, _ in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [store_KTD[:, : states_KLD.shape[1]] for store_KTD, states_KLD in pairs],
            [states_KLD for _, states_KLD in pairs],
        )

    def aim(self, positions_S: torch.Tensor, span: int) -> None:
        """Say where the next decode step writes, and how many positions it reads."""
        self._positions_S = positions_S
        self._span = span
        self._index.clear()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        keys_SKTD, values_SKTD = self.rows[layer_idx]
        self._write(keys_SKTD, key_states)
        self._write(values_SKTD, value_states)
        return keys_SKTD[:, :, : self._span], values_SKTD[:, :, : self._span]

    def _write(self, store_SKTD: torch.Tensor, states_SK1D: torch.Tensor) -> None:
        size = store_SKTD.shape[-1]
        index, states = self._index_of(store_SKTD.shape[1]), states_SK1D.reshape(-1, size)
        with any_order(store_SKTD.device):
            store_SKTD.view(-1, size).index_copy_(0, index, states)

    def _index_of(self, heads: int) -> torch.Tensor:
        """Where (slot, head, position) lies when all rows are one long list. Same for every layer of a step."""
        if heads not in self._index:
            first_SK = torch.arange(self.slots * heads, device=self._positions_S.device).view(-1, heads)
            self._index[heads] = (first_SK * self.length + self._positions_S[:, None]).flatten()
        return self._index[heads]

    def _empty(self, states_1KLD: torch.Tensor) -> torch.Tensor:
        _, heads, _, size = states_1KLD.shape
        return states_1KLD.new_zeros(self.slots, heads, self.length, size)


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
    query_SH1D: torch.Tensor,
    keys_SKTD: torch.Tensor,
    values_SKTD: torch.Tensor,
    hidden_S11T: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """One query a slot against its row: plain products and a softmax in fp32, each slot on its own.

    Shapes: -> (S, H, 1, D)
    """
    slots, heads, _, size = query_SH1D.shape
    kv_heads, span = keys_SKTD.shape[1:3]
    query_BGD = query_SH1D.reshape(slots * kv_heads, -1, size)
    keys_BDT = keys_SKTD.reshape(slots * kv_heads, span, size).transpose(1, 2)
    scores = torch.bmm(query_BGD, keys_BDT).view(slots, heads, 1, span) * scaling
    shares = scores.masked_fill_(hidden_S11T, float("-inf")).softmax(-1, dtype=torch.float32)
    shares_BGT = shares.to(query_SH1D.dtype).view(slots * kv_heads, -1, span)
    values_BTD = values_SKTD.reshape(slots * kv_heads, span, -1)
    return torch.bmm(shares_BGT, values_BTD).view(slots, heads, 1, -1)


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
    hidden_S11T = attention_mask
    if sliding_window is not None:
        visible_S111 = (~hidden_S11T).sum(-1, keepdim=True)
        at_T = torch.arange(hidden_S11T.shape[-1], device=query.device)
        hidden_S11T = hidden_S11T | (at_T < visible_S111 - sliding_window)
    return decode_attention(query, key, value, hidden_S11T, scale).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class SlotModel:
    """A Hugging Face causal language model that decodes all slots at once."""

    def __init__(self, model: PreTrainedModel, slots: int, max_model_len: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        self.slots = slots
        self.max_model_len = max_model_len
        self.device = model.device
        self.cache = SlotCache(slots, -(-max_model_len // SMALLEST_SPAN) * SMALLEST_SPAN)
        self.buckets_spans = True
        self._graphs = Graphs()

    @torch.inference_mode()
    def prefill(self, token_ids: list[int]) -> Prefilled:
        """Run over one prompt. A pure function of the weights and the prompt."""
        length = len(token_ids)
        padded = padded_length(length, self.cache.length) if self.device.type == "cuda" else None
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
        tokens_S: torch.Tensor,
        positions_S: torch.Tensor,
        temperatures_S: torch.Tensor,
        uniforms_S: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token to every slot and draw the next. Shapes: 4 x (S,) -> (S,) int64, (S,) float64

        What comes back is overwritten by the next call.
        """
        span = self.span(int(positions_S.max()) + 1)

        def step(
            tokens_S: torch.Tensor,
            positions_S: torch.Tensor,
            temperatures_S: torch.Tensor,
            uniforms_S: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return sample(self.decode(tokens_S, positions_S, span), temperatures_S, uniforms_S)

        inputs = (tokens_S, positions_S, temperatures_S, uniforms_S)
        return self._graphs.run(("decode", span), step, inputs, self.device)

    @torch.inference_mode()
    def place(self, slot: int, prefilled: Prefilled) -> None:
        self.cache.place(slot, prefilled.layers)

    @torch.inference_mode()
    def decode(
        self, tokens_S: torch.Tensor, positions_S: torch.Tensor, span: int | None = None
    ) -> torch.Tensor:
        """Append one token to every slot, at its position. Shapes: (S,), (S,) int64 -> (S, V)"""
        tokens_S, positions_S = tokens_S.to(self.device), positions_S.to(self.device)
        span = span or self.span(int(positions_S.max()) + 1)
        self.cache.aim(positions_S, span)
        hidden_ST = torch.arange(span, device=self.device) > positions_S[:, None]
        output = self.model(
            input_ids=tokens_S[:, None],
            position_ids=positions_S[:, None],
            past_key_values=self.cache,
            attention_mask=hidden_ST[:, None, None],
            use_cache=True,
        )
        return output.logits[:, -1]

    def span(self, length: int) -> int:
        """How many cache positions a step reads: the next power of two, where that is known to change no bit."""
        if not self.buckets_spans:
            return self.cache.length
        span = SMALLEST_SPAN
        while span < length:
            span *= 2
        return min(span, self.cache.length)
