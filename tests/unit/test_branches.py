"""Rollouts that share a row with others get the log-probabilities and the gradients of rows of their own."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ratchet.models import branches
from ratchet.models.logprobs import Policy
from ratchet.trainer.packing import Example, micro_batches

TINY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
UNDERSTOOD = {
    "qwen3": Qwen3Config(**TINY, **HEADS),
    "qwen2": Qwen2Config(**TINY, **HEADS),
    "llama": LlamaConfig(**TINY, **HEADS),
    "mistral": MistralConfig(**TINY, **HEADS, sliding_window=None),
    "gemma": GemmaConfig(**TINY, **HEADS),
    "olmo2": Olmo2Config(**TINY, **HEADS),
    "phi3": Phi3Config(**TINY, **HEADS, sliding_window=None, pad_token_id=0),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}
NOT_UNDERSTOOD = {
    "windows that no layer type tells": GPTNeoConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "sliding windows": MistralConfig(**TINY, **HEADS, sliding_window=4),
    "some sliding windows": Gemma2Config(**TINY, **HEADS),
    "a state": MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2),
}


def rollouts():
    """Three groups with prompts of 3, 6 and 9 tokens and eight completions of 1 to 7 tokens each."""
    draw = np.random.default_rng(0)
    made = []
    for length in (3, 6, 9):
        prompt = draw.integers(0, 40, length).tolist()
        for size in draw.integers(1, 8, 8):
            made.append(
                Example([*prompt, *draw.integers(0, 40, size).tolist()], [False] * length + [True] * size)
            )
    return made


def learn(model, *, shares_prompts, temperature=0.7):
    """Log-probability by (prompt length, target, place in its rollout), and the gradient of their weighted sum."""
    policy = Policy(model)
    model.zero_grad()
    examples = [Example(e.token_ids, e.mask, [float(i)] * len(e.token_ids)) for i, e in enumerate(rollouts())]
    found: dict[tuple[int, int], list[float]] = {}
    for micro in micro_batches(examples, 200, 0, 1, shares_prompts=shares_prompts):
        tensors = [torch.from_numpy(x) for x in (micro.inputs_BT, micro.cells_N, micro.targets_N)]
        shared = micro.branches and tuple(torch.from_numpy(x) for x in micro.branches)
        assert (shared is not None) == shares_prompts
        logprobs = policy(*tensors, temperature, shared)
        slopes = torch.from_numpy(micro.behaviour_N) / 10 - 1  # another weight for each rollout
        (logprobs * slopes).sum().backward()
        for rollout, value in zip(micro.behaviour_N.tolist(), logprobs.tolist(), strict=True):
            found.setdefault(rollout, []).append(value)
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_shared_prompt_changes_nothing_but_rounding(name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNDERSTOOD[name], attn_implementation=attention)
    assert branches.are_known(model)
    apart, slopes_apart = learn(model, shares_prompts=False)
    together, slopes_together = learn(model, shares_prompts=True)
    assert apart.keys() == together.keys()
    for rollout, values in apart.items():
        assert together[rollout] == pytest.approx(values, abs=2e-5)
    for parameter, slope in slopes_apart.items():
        torch.testing.assert_close(slopes_together[parameter], slope, rtol=1e-3, atol=1e-4)


def test_every_known_model_was_tried_out():
    assert {config.model_type for config in UNDERSTOOD.values()} == branches.KNOWN


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_a_model_that_looks_at_more_than_the_mask_is_left_alone(name):
    model = AutoModelForCausalLM.from_config(NOT_UNDERSTOOD[name])
    assert not branches.are_known(model)


def test_who_sees_whom_by_hand():
    """Two tokens of a prompt, two of one completion, one of another."""
    seen = branches.visibility(torch.tensor([[0, 0, 1, 1, 2]]))[0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
