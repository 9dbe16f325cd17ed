"""What a server proves about its engine before it serves: on this machine, with this model and shape.

Which kernel a library picks depends on the processor and the shapes, so these are measured, not assumed.
"""

import torch
from transformers import PreTrainedModel

from ratchet.errors import Refusal
from ratchet.inference.sampling import sample
from ratchet.inference.slots import ATTENTION, ROWS, SlotModel, decode_attention, possible_rungs
from ratchet.log import LOGGER
from ratchet.models.check import unserved

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_positions(model: PreTrainedModel, max_model_len: int) -> int:
    """The longest sequence that both the configuration and the model allow.

    Raises: Refusal for a rotary embedding that depends on the longest sequence of the batch.
    """
    config = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and known < max_model_len:
        LOGGER.warning("The model knows %d positions: inference.max_model_len is %d here.", known, known)
        max_model_len = known
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    native = rope.get("original_max_position_embeddings") or known or 0
    if kind == "longrope" or (kind == "dynamic" and max_model_len > native):
        raise Refusal(
            f"The model's {kind} rotary embedding changes with the longest sequence of a batch, which this engine "
            'does not decode: set inference.engine = "vllm".'
        )
    return max_model_len


def check_model(slot_model: SlotModel) -> None:
    """Compare prefill and one decode step with the model's own forward pass: eager, which every model has.

    Raises: Refusal if this engine does not compute what the model means, or cannot run it.
    """
    name = type(slot_model.model).__name__
    try:
        gap = _gap(slot_model)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever a model raises that finds another cache or attention than it expects
        LOGGER.debug("the engine's check of %s", name, exc_info=True)
        raise Refusal(unserved(name, f"{type(error).__name__} in its own layers")) from None
    if not gap <= _TOLERANCE.get(slot_model.model.dtype, 5e-2):
        raise Refusal(unserved(name, f"its logits would be wrong by {gap:.1e} of their size"))


@torch.inference_mode()
def _gap(slot_model: SlotModel) -> float:
    """How far the engine's logits are from the model's own, as a part of the largest."""
    model = slot_model.model
    length = max(2, min(24, slot_model.max_model_len))
    token_ids = [(7 * i + 3) % model.config.get_text_config().vocab_size for i in range(length)]
    model.set_attn_implementation("eager")
    try:
        ids_1L = torch.tensor([token_ids], device=slot_model.device)
        expected_2V = model(input_ids=ids_1L, use_cache=False).logits[0, -2:]
    finally:
        model.set_attn_implementation(ATTENTION)
    prefilled = slot_model.prefill(token_ids[:-1])
    slot_model.place([0], prefilled)
    tokens_S = torch.full((slot_model.slots,), token_ids[-1])
    decoded_V = slot_model.decode(tokens_S, torch.full_like(tokens_S, length - 1))[0]
    found_2V = torch.stack([prefilled.logits_1V[0], decoded_V])
    return float((found_2V - expected_2V).abs().max() / expected_2V.abs().max().clamp(min=1e-3))


@torch.inference_mode()
def is_batch_invariant(slot_model: SlotModel) -> bool:
    """Whether every slot computes the same bits, and whether they depend on how much of the cache takes part.

    Where only the second fails, every step reads the whole cache, or decodes all slots, from here on. Needs a placed
    prompt (`check_model` leaves one).
    """
    generator = torch.Generator().manual_seed(0)
    for row in slot_model.cache.rows:
        for store_NSKPD in row:
            row_N1KPD = torch.randn(store_NSKPD[:, :1].shape, generator=generator).to(store_NSKPD)
            store_NSKPD.copy_(row_N1KPD.expand_as(store_NSKPD))
    if not _spans_agree(slot_model, generator):
        slot_model.spans = slot_model.spans[-1:]
    tokens_S = torch.full((slot_model.slots,), 1)
    last_S = torch.full_like(tokens_S, slot_model.max_model_len - 1)
    slot_model.rungs = [*_good_rungs(slot_model, last_S), slot_model.slots]
    return all(bool((found == found[:1]).all()) for found in _step(slot_model, tokens_S, last_S))


def _step(
    slot_model: SlotModel, tokens_R: torch.Tensor, positions_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and drawn logprobs of one step. Shapes: -> (R, V), (R,)"""
    logits_RV = slot_model.decode(tokens_R, positions_R)
    ones_R = torch.ones(len(tokens_R), dtype=torch.float64)
    return logits_RV, sample(logits_RV, ones_R, ones_R / 2)[1]


def _good_rungs(slot_model: SlotModel, positions_S: torch.Tensor) -> list[int]:
    """Numbers of rows at which a step computes the bits of all slots, whose rows are different here.

    On a CPU only: a step of a GPU takes as long for a few rows.
    """
    if slot_model.device.type != "cpu":
        return []
    tokens_S = torch.arange(slot_model.slots) % slot_model.model.config.get_text_config().vocab_size
    expected = _step(slot_model, tokens_S, positions_S)

    def agrees(rung: int) -> bool:
        found = _step(slot_model, tokens_S[:rung], positions_S[:rung])
        return all(torch.equal(a, b[:rung]) for a, b in zip(found, expected, strict=True))

    return [rung for rung in possible_rungs(slot_model.slots) if agrees(rung)]


def _spans_agree(slot_model: SlotModel, generator: torch.Generator) -> bool:
    """Attention over rows that a smaller span just holds: the same bits at every span. On a CPU a few rows will do."""
    cache = slot_model.cache
    rows = min(slot_model.slots, ROWS) if slot_model.device.type == "cpu" else slot_model.slots
    heads = slot_model.model.config.get_text_config().num_attention_heads
    keys_NSKPD, values_NSKPD = cache.rows[0]
    query_RH1D = torch.randn((rows, heads, 1, keys_NSKPD.shape[-1]), generator=generator).to(keys_NSKPD)

    def attend(length: int, span: int) -> torch.Tensor:
        hidden_R11T = (torch.arange(span, device=keys_NSKPD.device) >= length).expand(rows, 1, 1, span)
        keys, values = (cache.read(store, rows, span) for store in (keys_NSKPD, values_NSKPD))
        return decode_attention(query_RH1D, keys, values, hidden_R11T, 1.0)

    return all(
        torch.equal(attend(length, span), attend(length, slot_model.spans[-1]))
        for span in slot_model.spans[:-1]
        for length in (span - 13, span)
    )
