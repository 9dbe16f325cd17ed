"""Which kernel computes attention; the kernels themselves need a GPU (benchmarks/gpu.py compares and repeats them)."""

import pytest
import torch

from ratchet.config import ModelConfig
from ratchet.models import attention, branches, flash
from ratchet.models.build import build

MODEL = {"name": "examples/reverse_text/model", "random_init": True, "attention": "sdpa"}
CPU = torch.device("cpu")


@pytest.fixture
def model():
    return build(ModelConfig(**MODEL), seed=0)


def states(model, length):
    ids = torch.arange(length)[None] % 50 + 3
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def test_a_cpu_keeps_the_kernel_of_torch(model):
    attention.choose(model, CPU, torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("device", "is_recorded", "chosen"),
    [("cuda", True, attention.PLAIN), ("cuda", False, "eager"), ("cpu", True, "eager")],
)
def test_eager_is_left_only_where_its_mask_would_have_to_be_recorded(model, device, is_recorded, chosen):
    """Its mask takes a zero from the host, which no CUDA graph can."""
    expected = states(model, 20)
    model.set_attn_implementation("eager")
    attention.choose(model, torch.device(device), torch.float32, is_recorded=is_recorded)
    assert model.config._attn_implementation == chosen
    torch.testing.assert_close(states(model, 20), expected)


def test_eager_stays_where_it_means_something_else(model):
    """Gemma 2 caps its scores, which torch's kernel does not."""
    model.config.model_type = "gemma2"
    model.set_attn_implementation("eager")
    attention.choose(model, torch.device("cuda"), torch.float32, is_recorded=True)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", attention.KERNELS)
def test_transformers_takes_the_names_and_short_rows_are_computed_by_torch(model, name):
    expected = states(model, 20)
    model.set_attn_implementation(name)
    assert torch.equal(states(model, 20), expected)


def test_long_rows_go_to_the_kernel_with_its_shapes(monkeypatch, model):
    """Of what transformers hands over: heads before positions; back come positions before heads."""
    calls = []

    def kernel(query, key, value, window, scale):
        calls.append((tuple(query.shape), tuple(key.shape), window, scale))
        repeated = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, is_causal=True, scale=scale
        ).transpose(1, 2)

    expected = states(model, 40)
    monkeypatch.setattr(attention, "SHORTEST", 32)
    monkeypatch.setitem(
        attention.ALL_ATTENTION_FUNCTIONS._global_mapping,
        attention.FLEX,
        lambda *args, **more: attention.attend(kernel, *args, **more),
    )
    model.set_attn_implementation(attention.FLEX)
    torch.testing.assert_close(states(model, 40), expected)
    config = model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert (
        calls == [((1, heads, 40, size), (1, groups, 40, size), None, size**-0.5)] * config.num_hidden_layers
    )


@pytest.mark.parametrize("broken", [lambda q, k, v, w, s: q.transpose(1, 2) * 1.0, lambda *a: 1 / 0])
def test_a_kernel_that_gives_something_else_or_fails_is_noticed(monkeypatch, model, broken):
    monkeypatch.setattr(attention, "SHORTEST", 32)
    with pytest.raises((ValueError, ZeroDivisionError, RuntimeError)):
        attention._try_out(broken, model, CPU)


def test_a_kernel_that_gives_what_torch_gives_is_taken(monkeypatch, model):
    def right(query, key, value, window, scale):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        ).transpose(1, 2)

    monkeypatch.setattr(attention, "SHORTEST", 32)
    attention._try_out(right, model, CPU)


def test_the_operator_says_its_shapes_before_it_runs():
    """What a compiler asks: both passes, without a value."""
    query, key, value = (
        torch.empty((2, 64, heads, 16), device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    out = flash.attend(query, key, value, scale=1.0)
    assert out.shape == query.shape
    out.sum().backward()
    assert [one.grad.shape for one in (query, key, value)] == [query.shape, key.shape, value.shape]


def test_without_the_package_there_is_no_flash(monkeypatch):
    monkeypatch.setattr(attention.importlib.metadata, "version", raising_not_found)
    assert not attention._has_flash(torch.device("cuda"))


def raising_not_found(name):
    raise attention.importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("name", attention.KERNELS)
def test_every_kernel_leaves_prompts_shared(model, name):
    model.set_attn_implementation(name)
    assert branches.are_known(model)


@pytest.mark.parametrize(("length", "window"), [(40, 32), (40, 40), (40, None)])
def test_a_short_row_that_is_longer_than_a_window_goes_to_the_kernel(length, window):
    """torch's kernel would let it see everything before it."""
    seen = []

    def kernel(query, key, value, window, scale):
        seen.append(window)
        return query.transpose(1, 2)

    row = torch.ones(1, 2, length, 8)
    module = torch.nn.Module()
    attention.attend(kernel, module, row, row, row, None, sliding_window=window)
    assert seen == ([window] if window == 32 else [])


@pytest.mark.parametrize("window", [None, 3, 9])
def test_the_plain_kernel_sees_what_lies_before_and_within_the_window(window):
    """Queries of zero see all alike: each result is the mean of the values in sight, which are 0, 1, 2, ..."""
    query, key = torch.zeros(1, 2, 6, 4), torch.randn(1, 1, 6, 4)
    value = torch.arange(6.0).reshape(1, 1, 6, 1).expand(1, 1, 6, 4)
    found = attention._plain(query, key, value, window, 0.5)
    means = [0, 0.5, 1, 2, 3, 4] if window == 3 else [0, 0.5, 1, 1.5, 2, 2.5]
    assert found.shape == (1, 6, 2, 4)
    torch.testing.assert_close(found[0, :, 1, 0], torch.tensor(means, dtype=torch.float32))
