"""What a server proves about its engine before it serves: on this machine, with this model and shape.

Which kernel a library picks depends on the processor and the shapes, so these are measured, not assumed.
"""

import torch
from transformers import PreTrainedModel

from ratchet.errors import Refusal
from ratchet.inference.slots import ATTENTION, SMALLEST_SPAN, SlotModel, decode_attention
from ratchet.log import LOGGER

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
            "does not decode: choose another model."
        )
    return max_model_len


@torch.inference_mode()
def check_model(slot_model: SlotModel) -> None:
    """Compare prefill and one decode step with the model's own forward pass: eager, which every model has.

    Raises: Refusal if this engine does not compute what the model means.
    """
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
    slot_model.place(0, prefilled)
    tokens_S = torch.full((slot_model.slots,), token_ids[-1])
    decoded_V = slot_model.decode(tokens_S, torch.full_like(tokens_S, length - 1))[0]
    found_2V = torch.stack([prefilled.logits_1V[0], decoded_V])
    gap = float((found_2V - expected_2V).abs().max() / expected_2V.abs().max().clamp(min=1e-3))
    if not gap <= _TOLERANCE.get(model.dtype, 5e-2):
        raise Refusal(
            f"The embedded engine does not reproduce {type(model).__name__}: its logits differ from the model's own "
            f"by {gap:.1e} of their size. Choose a model with ordinary causal attention."
        )


@torch.inference_mode()
def is_batch_invariant(slot_model: SlotModel) -> bool:
    """Whether every slot computes the same bits, and whether they depend on how much cache is read.

    Where only the second fails, every step reads the whole cache from here on. Needs a placed prompt
    (`check_model` leaves one).
    """
    generator = torch.Generator().manual_seed(0)
    for keys_SKTD, values_SKTD in slot_model.cache.rows:
        for store_SKTD in (keys_SKTD, values_SKTD):
            row = torch.randn(store_SKTD.shape[1:], generator=generator).to(store_SKTD)
            store_SKTD.copy_(row.expand_as(store_SKTD))
    slot_model.buckets_spans = _spans_agree(slot_model, generator)
    tokens_S = torch.full((slot_model.slots,), 1)
    logits_SV = slot_model.decode(tokens_S, torch.full_like(tokens_S, slot_model.max_model_len - 1))
    return bool((logits_SV == logits_SV[:1]).all())


def _spans_agree(slot_model: SlotModel, generator: torch.Generator) -> bool:
    """Attention over a row that a smaller span just holds: the same bits at every span."""
    whole = slot_model.cache.length
    heads = slot_model.model.config.get_text_config().num_attention_heads
    keys_SKTD, values_SKTD = slot_model.cache.rows[0]
    shape = (slot_model.slots, heads, 1, keys_SKTD.shape[-1])
    query_SH1D = torch.randn(shape, generator=generator).to(keys_SKTD)

    def attend(length: int, span: int) -> torch.Tensor:
        hidden_S11T = (torch.arange(span, device=keys_SKTD.device) >= length).expand(shape[0], 1, 1, span)
        return decode_attention(
            query_SH1D, keys_SKTD[:, :, :span], values_SKTD[:, :, :span], hidden_S11T, 1.0
        )

    spans = [SMALLEST_SPAN]
    while spans[-1] < whole:
        spans.append(min(2 * spans[-1], whole))
    return all(
        torch.equal(attend(length, span), attend(length, whole))
        for span in spans[:-1]
        for length in (span // 2 + 3, span)
    )
