"""Models are what they say: what is published, exported and adopted, what the trainer and the engine compute of it."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
from dcp import plain_dcp
from ratchet import durable
from ratchet.attempts import Assignment, Plan
from ratchet.config import ModelConfig, RLConfig
from ratchet.errors import Refusal
from ratchet.inference import adoption, checks
from ratchet.inference.slots import SlotModel
from ratchet.models import build, naming, tensors
from ratchet.models.check import check_model, check_served
from ratchet.models.check_policy import check_policy
from ratchet.models.logprobs import Policy
from ratchet.models.trainable import build_trainable
from ratchet.timeline import Timeline
from ratchet.trainer import state
from ratchet.trainer.packing import Example
from ratchet.trainer.publish import Publisher
from ratchet.trainer.replay import Replay
from ratchet.trainer.source import Batch
from ratchet.trainer.update import open_updater, set_mode
from training import Run, settings

RENAMED = ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "gemma3"]
"""Families whose tensors have other names in files than in transformers' modules."""
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def base_of(directory, family, **changes):
    """A model directory as `save_pretrained` writes it; returns what it holds."""
    families.model(family, **changes).save_pretrained(directory)
    return load_file(directory / build.WEIGHTS)


def run_of(root, world, base, *, attempt=1, **model):
    config = settings(model={"name": str(base), "random_init": False, **model})
    run = Run(root, world, config, attempt)
    run.paths.weights.mkdir(exist_ok=True)
    return run


def publish(run, memory=None):
    """Policy of now, by the disk or through memory; returns its directory on the disk."""
    stage = run.checkpointer._assignment.stage
    assignment = Assignment(
        paths=run.paths, config=run.config, plan=Plan(), attempt=1, run_id="x", lineage=0, stage=stage
    )
    if memory is not None:
        transport = {"transport": "memory", "memory_dir": str(memory)}
        config = RLConfig(model=run.config.model, max_steps=9, ckpt={}, weights=transport)
        assignment = replace(assignment, config=config)
    publisher = Publisher(assignment, run.checkpointer._world, Timeline(None))
    step = run.state.progress.step
    publisher.publish(run.model, step)
    publisher.wait()
    publisher.keep([step])
    return run.paths.weight(step)


def export(run, source, dtype="float32"):
    target = run.paths.root / f"exported_{dtype}"
    target.mkdir()
    tensors.export(run.paths.checkpoint(source), target, run.config.model, seed=0, dtype=dtype)
    return target


def equal(found, expected):
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


# -- names and buffers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt2", *RENAMED])
def test_what_is_published_has_the_names_of_the_base_and_the_values_of_the_policy(world, tmp_path, family):
    base = base_of(tmp_path / "base", family)
    run = run_of(tmp_path / "run", world, tmp_path / "base")
    run.train(1)
    policy = tensors.full_tensors(run.model)
    assert (policy.keys() != base.keys()) == (family in RENAMED)
    published = publish(run)
    assert load_file(published / build.WEIGHTS).keys() == base.keys()
    loaded = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    assert equal(tensors.full_tensors(loaded), policy) == []
    run.save()
    exported = export(run, 1)
    for name in (build.WEIGHTS, "config.json"):
        assert (exported / name).read_bytes() == (published / name).read_bytes()


def test_where_names_do_not_differ_the_file_is_that_of_the_models_own_tensors(world, tmp_path):
    base_of(tmp_path / "base", "qwen3")
    run = run_of(tmp_path / "run", world, tmp_path / "base")
    run.train(1)
    own = {name: parameter.full_tensor().detach() for name, parameter in run.model.named_parameters()}
    save_file(own, tmp_path / "own.safetensors", metadata={"format": "pt"})
    assert durable.hash_file(publish(run) / build.WEIGHTS) == durable.hash_file(tmp_path / "own.safetensors")


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3"])
def test_a_model_without_files_gets_the_names_of_its_family(world, tmp_path, family):
    """They are also those of the second run, which begins with what the first has published."""
    families.config(family).save_pretrained(tmp_path / "shape")
    first = run_of(tmp_path / "first", world, tmp_path / "shape", random_init=True)
    published = publish(first)
    first.model.to("cpu")
    plain = build.build(first.config.model, seed=0)
    plain.save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / build.WEIGHTS)
    assert equal(load_file(published / build.WEIGHTS), expected) == []
    first.train(1)
    first.save()
    assert load_file(export(first, 1) / build.WEIGHTS).keys() == expected.keys()
    second = publish(run_of(tmp_path / "second", world, published))
    assert durable.hash_file(second / build.WEIGHTS) == durable.hash_file(published / build.WEIGHTS)


def test_through_memory_a_renamed_policy_is_the_same(world, tmp_path):
    base_of(tmp_path / "base", "glm4_moe")
    run = run_of(tmp_path / "run", world, tmp_path / "base")
    by_disk = durable.verify(publish(run)).files
    shutil.rmtree(run.paths.weight(0))
    memory = Path(tempfile.mkdtemp(prefix="ratchet-test-", dir="/dev/shm"))
    try:
        by_memory = durable.verify(publish(run, memory)).files
    finally:
        shutil.rmtree(memory)
    assert by_memory == by_disk


def test_adapters_of_a_renamed_model_are_published_and_merged_under_the_names_of_the_base(world, tmp_path):
    base = base_of(tmp_path / "base", "qwen3_moe")
    lora = {"rank": 2, "alpha": 8, "target_modules": ["q_proj"]}
    run = run_of(tmp_path / "run", world, tmp_path / "base", lora=lora)
    run.train(2)
    found = load_file(publish(run) / build.WEIGHTS)
    changed = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert sorted(equal(found, base)) == changed
    run.save()
    merged = tmp_path / "merged"
    merged.mkdir()
    model = run.config.model
    tensors.export_merged(run.paths.checkpoint(2), merged, model, model.lora, seed=0, dtype="float32")
    assert (merged / build.WEIGHTS).read_bytes() == (run.paths.weight(2) / build.WEIGHTS).read_bytes()


def test_a_router_keeps_the_bias_by_which_it_chooses_experts(world, tmp_path):
    base = base_of(tmp_path / "base", "glm4_moe")
    assert base[BIAS].abs().min() > 0
    run = run_of(tmp_path / "run", world, tmp_path / "base")
    run.train(1)
    held = plain_dcp(run.save() / "trainer")
    assert torch.equal(held[f"model.{BIAS}"], base[BIAS])
    for dtype in ("float32", "bfloat16"):
        exported = load_file(export(run, 1, dtype) / build.WEIGHTS)
        assert torch.equal(exported[BIAS], base[BIAS])
        assert exported["lm_head.weight"].dtype == getattr(torch, dtype)


def test_a_checkpoint_of_before_has_no_buffers_and_goes_on_with_those_of_the_base(
    world, tmp_path, monkeypatch
):
    base = base_of(tmp_path / "base", "glm4_moe")
    run = run_of(tmp_path / "run", world, tmp_path / "base")
    run.train(1)
    with monkeypatch.context() as patched:
        patched.setattr(state, "saved_buffers", lambda model: {})
        held = plain_dcp(run.save() / "trainer")
    assert f"model.{BIAS}" not in held
    assert torch.equal(load_file(export(run, 1) / build.WEIGHTS)[BIAS], base[BIAS])
    again = run_of(tmp_path / "run", world, tmp_path / "base", attempt=2)
    again.restore(1)
    assert equal(tensors.full_tensors(again.model), tensors.full_tensors(run.model)) == []
    assert replay_of(again)._state_difference(1) == ""


def replay_of(run):
    replay = Replay.__new__(Replay)
    replay._paths, replay._state = run.paths, run.state
    return replay


def test_a_replay_compares_buffers(world, tmp_path):
    base_of(tmp_path / "base", "glm4_moe")
    run = run_of(tmp_path / "run", world, tmp_path / "base")
    run.train(1)
    run.save()
    replay = replay_of(run)
    assert replay._state_difference(1) == ""
    run.model.get_buffer(BIAS)[2] += 0.25
    assert replay._state_difference(1).startswith(f"model.{BIAS} differs by up to 0.25")


# -- adoption -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", *RENAMED])
def test_a_server_finds_its_own_tensors_in_those_of_the_file(tmp_path, family):
    base_of(tmp_path, family)
    served = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    places = {name: tensor.data_ptr() for name, tensor in served.state_dict().items()}
    trained = {name: tensor + 1 for name, tensor in tensors.full_tensors(served).items()}
    with torch.no_grad():
        adoption.copier(served, naming.outward(served, trained))()
    assert equal(tensors.full_tensors(served), trained) == []
    assert {name: tensor.data_ptr() for name, tensor in served.state_dict().items()} == places
    with torch.no_grad():  # a policy of an older version has the names of the modules
        adoption.copier(served, {name: tensor - 1 for name, tensor in trained.items()})()
    assert equal(tensors.full_tensors(served), {name: t - 1 for name, t in trained.items()}) == []


def test_a_server_without_values_only_compares_shapes(tmp_path):
    """That of vLLM's environment, whose own loader knows the names of the files."""
    held = base_of(tmp_path, "qwen3_moe")
    pairs = adoption.match(shape := naming.empty(families.config("qwen3_moe")), naming.inward(shape, held))
    assert len(pairs) == len(shape.state_dict())
    assert all(source.is_meta for _, source in pairs)


EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held.pop("model.layers.1.mlp.gate.weight"), "lacks the tensor model.layers.1.mlp.gate"),
        (lambda held: held.update(other=torch.zeros(2)), "does not know: other"),
        (
            lambda held: held.pop(EXPERT),
            r"experts.down_proj has shape \[3, 32, 16\]; the model's is \[4, 32, 16\]",
        ),
        (lambda held: held.update({EXPERT: torch.zeros(5, 5)}), "experts.down_proj cannot be made"),
    ],
)
def test_files_that_do_not_fit_a_renamed_model_are_refused(tmp_path, change, says):
    held = base_of(tmp_path, "qwen3_moe")
    served = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before = tensors.full_tensors(served)
    change(held)
    with pytest.raises(Refusal, match=says):
        adoption.copier(served, held)
    assert equal(tensors.full_tensors(served), before) == []


# -- what the trainer computes ------------------------------------------------------------------------------

RIGHT = [
    "qwen3", "gemma", "gpt2", "granite", "qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "gemma3", "mamba",
    "lfm2", "qwen3_next", "falcon_h1",
]  # fmt: skip


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_the_trainer_reproduces_is_taken_as_it_is(family):
    model = families.model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_policy(model)
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert equal(model.state_dict(), before) == []
    ids = torch.arange(3, 20)[None]
    assert model(input_ids=ids).logits.abs().max() < 5, "the hook of the head is gone"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.02}),
        ("recurrent_gemma", {}),
        ("gemma2", {}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_family_that_scales_or_caps_its_logits_is_refused(family, changes, attention):
    """Also before it is trained, while its logits are too small for a cap to matter."""
    with pytest.raises(Refusal, match=r"The trainer does not reproduce .*choose another model"):
        check_policy(families.model(family, attention, **changes))


def capped(attention):
    """Scores that the cap of attention changes."""
    model = families.model("gemma2", attention, final_logit_softcapping=None, attn_logit_softcapping=2.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(200)
    return model


def test_attention_that_leaves_out_a_cap_is_refused_and_eager_is_not():
    with pytest.raises(Refusal, match=r'"sdpa" leaves out a part of .*set model.attention = "eager"'):
        check_policy(model := capped("sdpa"))
    assert model.config._attn_implementation == "sdpa"
    check_policy(capped("eager"))


def test_a_model_that_sees_what_comes_later_is_refused():
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    kind = families.AutoConfig.for_model("bert", vocab_size=96, **config)
    with pytest.raises(Refusal, match="BertLMHeadModel, which is not causal"):
        check_policy(AutoModelForCausalLM.from_config(kind))


def test_one_token_that_rounding_sends_to_another_expert_is_no_difference(monkeypatch):
    def forward(self, inputs_BT, cells_N, *arguments, compute=Policy.forward):
        found = compute(self, inputs_BT, cells_N, *arguments)
        return found + shift * (torch.arange(len(found)) < tokens)

    monkeypatch.setattr(Policy, "forward", forward)
    shift, tokens = 1.0, 3
    check_policy(families.model("qwen3_moe"))
    tokens = 15
    with pytest.raises(Refusal, match="does not reproduce"):
        check_policy(families.model("qwen3_moe"))


def losses(config, world, batch):
    """Of the same update under two seeds."""
    found = []
    for seed in (1, 2):
        module = build.build(config.model, seed=0)
        updater = open_updater(module, config.model_copy(update={"seed": seed}), world)
        found.append(updater.update(batch, 0, 1.0)["loss"])
    return found


@pytest.mark.parametrize("recorded", [False, True])
def test_rl_drops_nothing_and_sft_what_the_model_says(world, tmp_path, recorded):
    base_of(tmp_path, "gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    sft = settings(model={"name": str(tmp_path), "random_init": False}, cuda_graphs=recorded)
    trainer = {"precision": "fp32", "device": "cpu", "cuda_graphs": recorded}
    rl = RLConfig(model=sft.model, max_steps=9, trainer=trainer)
    ids = list(range(3, 15))
    batch = Batch([Example(ids, [False, *[True] * 11], [-4.0] * 12, advantage=1.0)] * 2)
    one, other = losses(rl, world, batch)
    assert one == other
    one, other = losses(sft, world, batch)
    assert one != other


def test_dropout_of_adapters_is_the_runs_own_setting_and_stays_in_rl(tmp_path):
    lora = {"rank": 2, "target_modules": ["q_proj"], "dropout": 0.5}
    base_of(tmp_path, "qwen3", attention_dropout=0.1)
    rl = RLConfig(model=ModelConfig(name=str(tmp_path), attention="eager", lora=lora), max_steps=9)
    module, _ = build_trainable(rl.model, seed=0)
    set_mode(module, rl)
    dropping = [name for name, part in module.named_modules() if part.training and not list(part.children())]
    assert dropping == [f"model.layers.{i}.self_attn.q_proj.lora_dropout.default" for i in range(2)]


# -- what the engine can serve ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["mamba", "lfm2", "qwen3_next", "deepseek_v3", "falcon_h1", "recurrent_gemma"]
)
def test_a_family_that_the_engine_cannot_serve_is_refused_with_the_engine_that_can(tmp_path, family):
    """From the config before anything starts, and by the engine itself."""
    says = 'The embedded engine cannot serve .*: set inference.engine = "vllm"'
    model = families.model(family)
    with pytest.raises(Refusal, match=says):
        checks.check_model(SlotModel(model, 4, 64))
    model.config.save_pretrained(tmp_path)
    source = ModelConfig(name=str(tmp_path), random_init=True)
    check_model(source)
    with pytest.raises(Refusal, match=says):
        check_served(source)


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gpt2", "qwen3_moe", "mixtral", "glm4_moe", "gemma3"])
def test_a_family_that_the_engine_serves_is_not_refused(tmp_path, family):
    model = families.model(family)
    checks.check_model(SlotModel(model, 4, 64))
    model.config.save_pretrained(tmp_path)
    check_served(ModelConfig(name=str(tmp_path), random_init=True))
