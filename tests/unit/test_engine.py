"""The embedded engine: what it samples is a function of (weights, prompt, seed), and its logprobs are the model's."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ratchet.config import ModelConfig
from ratchet.errors import Refusal
from ratchet.inference import checks
from ratchet.inference.engine import Engine, Sequence, Span
from ratchet.inference.sampling import draw_uniforms, sample
from ratchet.inference.serving import make_repeatable
from ratchet.inference.slots import SlotModel, possible_rungs
from ratchet.models.build import build

TINY = ModelConfig(name="examples/reverse_text/model", random_init=True)
LENGTH = 128
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(autouse=True, scope="module")
def _repeatable():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        make_repeatable(threads=1)
        yield
    torch.use_deterministic_algorithms(False)


def build_model(**changes):
    """The tiny model, with larger weights than at its birth: near-uniform logits would hide mistakes."""
    config = AutoConfig.from_pretrained(TINY.name, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def build_engine(slots=8, model=None, device="cpu", dtype=torch.float32):
    model = (build_model() if model is None else model).to(device, dtype)
    slot_model = SlotModel(model, slots, LENGTH)
    return Engine(slot_model, lambda ids: "".join(chr(96 + i) for i in ids))


@pytest.fixture(scope="module", params=DEVICES)
def engine(request):
    engine = build_engine(device=request.param)
    checks.check_model(engine.model)
    assert checks.is_batch_invariant(engine.model)
    return engine


def requests(count, seed=0, longest=60):
    """Prompts and lengths of every size, so that slots are shared and left at different times."""
    chance = random.Random(seed)
    return [
        {
            "prompt": [chance.randrange(2, 64) for _ in range(chance.randint(1, longest))],
            "max_tokens": chance.randint(1, 40),
            "temperature": chance.choice([0.0, 0.7, 1.0, 1.3]),
            "seed": chance.randrange(2**63),
        }
        for _ in range(count)
    ]


def finish(engine, wanted):
    """Run requests together; their exact results in the order given."""
    sequences = [Sequence(**one) for one in wanted]
    for sequence in sequences:
        engine.submit(sequence)
    engine.run()
    return [(one.token_ids, one.logprobs, one.finish_reason) for one in sequences]


def alone(engine, wanted):
    return [finish(engine, [one])[0] for one in wanted]


# -- bits ---------------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_traffic_order_or_slot(engine):
    wanted = requests(24)
    expected = alone(engine, wanted)
    assert finish(engine, wanted) == expected
    order = list(range(24))
    for shuffle in range(3):
        random.Random(shuffle).shuffle(order)
        found = finish(engine, [wanted[i] for i in order])
        assert found == [expected[i] for i in order]
    assert finish(engine, [one for one in wanted for _ in range(2)])[::2] == expected


def test_a_request_has_the_same_bits_in_every_slot(engine):
    one = {"prompt": [5, 9, 13], "max_tokens": 12, "temperature": 1.0, "seed": 7}
    results = finish(engine, [one] * 8)
    assert all(result == results[0] for result in results)


def test_bits_do_not_depend_on_arrival_in_the_middle_of_others(engine):
    wanted = requests(12, seed=1)
    expected = alone(engine, wanted)
    sequences = [Sequence(**one) for one in wanted]
    for sequence in sequences:
        engine.submit(sequence)
        engine.step()
    engine.run()
    assert [(one.token_ids, one.logprobs, one.finish_reason) for one in sequences] == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 5, 16, 33])
def test_bits_hold_at_every_number_of_slots_that_the_startup_check_accepts(slots, dtype, device):
    engine = build_engine(slots, device=device, dtype=dtype)
    checks.check_model(engine.model)
    assert checks.is_batch_invariant(engine.model)
    wanted = requests(6, seed=2)
    assert finish(engine, wanted) == alone(engine, wanted)


def test_reading_more_of_the_cache_changes_no_bit(engine, monkeypatch):
    wanted = requests(6, seed=3, longest=20)
    expected = finish(engine, wanted)
    monkeypatch.setattr(engine.model, "spans", engine.model.spans[-1:])
    assert finish(engine, wanted) == expected


def test_what_a_slot_held_before_leaks_nowhere(engine):
    wanted = requests(8, seed=4)
    expected = finish(engine, wanted)
    with torch.inference_mode():
        for store in (store for row in engine.model.cache.rows for store in row):
            store.fill_(float("nan"))
    assert finish(engine, wanted) == expected


def test_a_prompt_computed_once_for_a_group_has_the_bits_of_computing_it_again(engine):
    wanted = [{**requests(1)[0], "seed": seed} for seed in range(4)]
    shared = finish(engine, wanted)
    separate = []
    for one in wanted:
        engine.forget_prompts()
        separate += finish(engine, [one])
    assert shared == separate


def test_few_sequences_gather_in_the_first_rows_and_no_bit_changes(monkeypatch):
    engine = build_engine(slots=48)
    checks.check_model(engine.model)
    assert checks.is_batch_invariant(engine.model)
    assert engine.model.rungs == [16, 32, 48]
    # The first to come, which have the first slots, are the first to end.
    wanted = [{**one, "max_tokens": 3 + i // 2} for i, one in enumerate(requests(44, seed=5))]
    decoded = []
    decode = engine.model.decode

    def spy(tokens_R, positions_R, span=None):
        decoded.append((len(tokens_R), len(engine.active)))
        return decode(tokens_R, positions_R, span)

    monkeypatch.setattr(engine.model, "decode", spy)
    found = finish(engine, wanted)
    assert {rows for rows, _ in decoded} == {16, 32, 48}
    assert all(rows - 16 < active <= rows for rows, active in decoded)
    monkeypatch.setattr(engine.model, "rungs", [48])
    assert found == finish(engine, wanted) == alone(engine, wanted)


def test_a_number_of_rows_that_gives_other_bits_is_not_used(monkeypatch):
    slot_model = build_engine(slots=64).model
    checks.check_model(slot_model)
    decode = slot_model.decode

    def uneven(tokens_R, positions_R, span=None):
        logits_RV = decode(tokens_R, positions_R, span)
        if len(tokens_R) == 32:
            logits_RV[3, 0] = torch.nextafter(logits_RV[3, 0], torch.tensor(9.0))
        return logits_RV

    monkeypatch.setattr(slot_model, "decode", uneven)
    assert checks.is_batch_invariant(slot_model)
    assert slot_model.rungs == [16, 48, 64]
    assert [slot_model.rows(count) for count in (1, 16, 17, 48, 49)] == [16, 16, 48, 48, 64]


def test_a_few_numbers_of_rows_are_tried_however_many_slots_there_are():
    assert possible_rungs(16) == []
    assert possible_rungs(40) == [16, 32]
    assert possible_rungs(128) == [16, 32, 48, 64, 80, 96, 112]
    assert possible_rungs(1000) == [128, 256, 384, 512, 640, 768, 896]


def test_a_step_reads_little_more_than_the_longest_sequence():
    slot_model = SlotModel(build_model(), 2, 1000)
    assert slot_model.spans == [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert [slot_model.span(length) for length in (1, 32, 33, 300, 1000)] == [32, 32, 64, 320, 1024]


@pytest.mark.parametrize("broken", ["slot", "draw", "span"])
def test_the_startup_check_sees_a_machine_that_is_not_invariant(broken, monkeypatch):
    slot_model = build_engine().model
    checks.check_model(slot_model)
    if broken == "slot":
        decode = slot_model.decode

        def uneven(tokens_S, positions_S, span=None):
            logits_SV = decode(tokens_S, positions_S, span)
            logits_SV[3, 0] = torch.nextafter(logits_SV[3, 0], torch.tensor(9.0))
            return logits_SV

        monkeypatch.setattr(slot_model, "decode", uneven)
        assert not checks.is_batch_invariant(slot_model)
    elif broken == "draw":

        def uneven_draw(logits_RV, *chances):
            tokens_R, logprobs_R = sample(logits_RV, *chances)
            return tokens_R, logprobs_R - 1e-12 * torch.arange(len(logprobs_R))

        monkeypatch.setattr(checks, "sample", uneven_draw)
        assert not checks.is_batch_invariant(slot_model)
    else:
        exact = checks.decode_attention
        monkeypatch.setattr(
            checks, "decode_attention", lambda *a: exact(*a) * (1 + 1e-6 * (a[3].shape[-1] > 64))
        )
        assert checks.is_batch_invariant(slot_model)
        assert slot_model.span(3) == LENGTH


# -- the model that is meant --------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "grouped heads": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "sliding window": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_are_those_of_a_teacher_forced_forward_pass(variant, device):
    engine = build_engine(model=build_model(**VARIANTS[variant]), device=device)
    reference = build_model(**VARIANTS[variant]).eval()
    sequences = [
        Sequence([3, 8 + i, 20], 40, temperature, 11) for i, temperature in enumerate([1.0, 0.6, 0.0])
    ]
    for sequence in sequences:
        engine.submit(sequence)
    engine.run()
    for one in sequences:
        ids = torch.tensor([one.prompt + one.token_ids])
        with torch.no_grad():
            logits = reference(input_ids=ids, use_cache=False).logits[0, len(one.prompt) - 1 : -1]
        expected = (logits / (one.temperature or 1.0)).log_softmax(-1)
        found = expected.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert torch.allclose(found, torch.tensor(one.logprobs), atol=1e-4)
        assert min(one.logprobs) < -0.01, "a distribution with one certain token would prove nothing"
        if one.temperature == 0:
            assert one.token_ids == logits.argmax(-1).tolist()


def test_a_model_whose_attention_is_another_one_is_refused():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=2, intermediate_size=64, attn_logit_softcapping=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    with pytest.raises(Refusal, match=r"cannot serve Gemma2ForCausalLM \(its logits would be wrong"):
        checks.check_model(SlotModel(model, 4, 64))


def test_the_models_own_limit_of_positions_holds():
    assert checks.check_positions(build_model(), 512) == 128
    assert checks.check_positions(build_model(), 100) == 100


def test_a_rotary_embedding_that_sees_the_whole_batch_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with pytest.raises(Refusal, match="dynamic rotary embedding"):
        checks.check_positions(build_model(rope_parameters=rope), 128)


# -- sampling -----------------------------------------------------------------------------------------------


def test_seeds_are_honoured(engine):
    one = {"prompt": [4, 5, 6], "max_tokens": 30, "temperature": 1.0}
    first, second, third = finish(engine, [{**one, "seed": seed} for seed in (1, 2, 1)])
    assert first == third != second


def test_seeds_that_agree_in_their_lower_32_bits_differ():
    assert draw_uniforms(5, 4).tolist() != draw_uniforms(5 + 2**32, 4).tolist()
    assert draw_uniforms(5, 4).tolist() == draw_uniforms(5, 9)[:4].tolist()
    assert draw_uniforms(-1, 4).tolist() == draw_uniforms(2**64 - 1, 4).tolist()


def test_inverse_cdf_by_hand():
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample(probabilities.log(), torch.ones(6, dtype=torch.float64), uniforms)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25, 0.25])


def test_temperature_changes_the_distribution_that_the_logprob_is_of():
    logits = torch.tensor([[0.0, 1.0]]).repeat(2, 1)
    tokens, logprobs = sample(logits, torch.tensor([0.5, 0.0]).double(), torch.tensor([0.0, 0.0]).double())
    assert tokens.tolist() == [0, 1]
    assert logprobs.exp().tolist() == pytest.approx([1 / (1 + 2.718281828**2), 2.718281828 / 3.718281828])


def test_sampled_frequencies_are_the_probabilities():
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 1.5
    count = 20_000
    uniforms = torch.tensor([float(draw_uniforms(seed, 1)[0]) for seed in range(count)], dtype=torch.float64)
    tokens, _ = sample(logits.expand(count, -1), torch.ones(count, dtype=torch.float64), uniforms)
    expected = logits.double().softmax(-1) * count
    chi_square = ((tokens.bincount(minlength=16) - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


# -- stopping -----------------------------------------------------------------------------------------------


def continuation(engine, count=20):
    return finish(engine, [{"prompt": [7, 8], "max_tokens": count, "temperature": 1.0, "seed": 3}])[0][0]


def test_a_stop_token_ends_the_completion_and_is_part_of_it(engine):
    tokens = continuation(engine)
    end = tokens[6]
    first = tokens.index(end)
    sequence = Sequence([7, 8], 20, 1.0, 3, stop_token_ids=frozenset({end}))
    engine.submit(sequence)
    engine.run()
    assert (sequence.token_ids, sequence.finish_reason) == (tokens[: first + 1], "stop")


def test_a_stop_string_ends_the_completion_across_tokens(engine):
    tokens = continuation(engine)
    text = "".join(chr(96 + i) for i in tokens)
    stop = text[4:6]
    sequence = Sequence([7, 8], 20, 1.0, 3, stop=("~~~", stop))
    engine.submit(sequence)
    engine.run()
    assert sequence.finish_reason == "stop"
    assert sequence.stopped_by == stop
    assert sequence.token_ids == tokens[: text.index(stop) + 2]


def test_length_is_capped_by_the_request_and_by_the_cache(engine):
    prompt = [9] * (LENGTH - 5)
    asked, full = finish(
        engine,
        [
            {"prompt": [9], "max_tokens": 3, "temperature": 1.0, "seed": 0},
            {"prompt": prompt, "max_tokens": 50, "temperature": 1.0, "seed": 0},
        ],
    )
    assert (len(asked[0]), asked[2]) == (3, "length")
    assert (len(full[0]), full[2]) == (5, "length")


def test_a_sequence_that_is_cancelled_leaves_its_slot_at_once(engine):
    first, second, waiting = (Sequence([5], 50, 1.0, seed) for seed in range(3))
    small = build_engine(slots=2)
    for sequence in (first, second, waiting):
        small.submit(sequence)
    small.step()
    small.cancel(first)
    small.step()
    assert set(small.active.values()) == {second, waiting}
    assert first.finish_reason is None


def test_abort_returns_what_is_there():
    engine = build_engine(slots=1)
    active, waiting = Sequence([5], 50, 1.0, 0), Sequence([5], 50, 1.0, 1)
    engine.submit(active)
    engine.submit(waiting)
    engine.step()
    engine.step()
    engine.abort()
    assert (len(active.token_ids), active.finish_reason) == (3, "abort")
    assert (waiting.token_ids, waiting.finish_reason) == ([], "abort")
    assert not engine.has_work


def test_logits_that_are_not_finite_end_the_sequence_and_poison_nothing_else():
    engine = build_engine()
    expected = finish(engine, requests(4))
    weight = engine.model.model.model.norm.weight
    sound = weight.clone()
    engine.adopt(lambda: weight.fill_(float("nan")), "bad")
    assert [reason for _, _, reason in finish(engine, requests(4))] == ["error"] * 4
    engine.adopt(lambda: weight.copy_(sound), "good")
    assert finish(engine, requests(4)) == expected


# -- live weights -------------------------------------------------------------------------------------------


def test_each_token_is_labelled_with_the_weights_that_sampled_it():
    engine = build_engine()
    sequence = Sequence([5, 6], 20, 1.0, 0)
    engine.submit(sequence)
    for _ in range(3):
        engine.step()
    head = engine.model.model.get_input_embeddings().weight
    engine.adopt(lambda: head.mul_(-1), "b")
    engine.run()
    # The first step samples twice: after the prefill and after the first decode.
    assert sequence.spans == [Span("default", 0, 4), Span("b", 4, 20)]


def test_a_sequence_continues_on_its_old_cache_or_on_a_recomputed_one():
    def run(*, recomputes):
        engine = build_engine()
        sequence = Sequence([5, 6, 7, 8], 24, 1.0, 0)
        engine.submit(sequence)
        for _ in range(4):
            engine.step()
        engine.adopt(lambda: engine.model.model.model.layers[0].self_attn.v_proj.weight.mul_(0.5), "b")
        if recomputes:
            engine.recompute()
        engine.run()
        with torch.no_grad():
            ids = torch.tensor([sequence.prompt + sequence.token_ids])
            logits = engine.model.model(input_ids=ids, use_cache=False).logits[0, 3:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        return (expected - torch.tensor(sequence.logprobs))[5:].abs().max()

    assert run(recomputes=True) < 1e-4 < run(recomputes=False)


def test_a_model_from_a_seed_is_the_one_that_training_starts_from():
    first, second = build(TINY, seed=3), build(TINY, seed=3)
    wanted = requests(2)
    assert finish(build_engine(model=first), wanted) == finish(build_engine(model=second), wanted)
