"""Adapters and frozen parameters: what is trained, what a checkpoint holds, what is published and exported."""

import dataclasses
import errno
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dcp import plain_dcp
from ratchet import durable
from ratchet.config import CkptConfig
from ratchet.errors import PoisonBatch, Refusal
from ratchet.models import adapters, tensors
from ratchet.models.build import build
from ratchet.models.trainable import build_trainable
from ratchet.trainer import shards, update
from ratchet.trainer.update import choose_loss
from training import Run, settings

LORA = {"rank": 4, "alpha": 12, "target_modules": ["q_proj", "up_proj"]}
EMBEDDING = "model.embed_tokens.weight"


def equal(found, expected):
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({"lora": LORA}, {}),
        ({"lora": LORA | {"dropout": 0.3}}, {"optim": {"type": "muon"}, "activation_checkpointing": "full"}),
        ({"freeze": [r"layers\.0\."]}, {}),
        ({"freeze": ["embed"]}, {"optim": {"type": "muon"}}),
        ({}, {"activation_checkpointing": "full"}),
    ],
)
def test_restored_and_trained_on_equals_trained_through(world, tmp_path, model, trainer):
    config = settings(model=model, **trainer)
    through = Run(tmp_path / "through", world, config)
    through.train(4)
    first = Run(tmp_path / "parts", world, config)
    first.train(2)
    first.save()
    second = Run(tmp_path / "parts", world, config, attempt=2)
    second.restore(2)
    second.train(2)
    assert equal(second.tensors(), through.tensors()) == []


class Count(TorchDispatchMode):
    """How often attention was computed."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "passes"), [("full", 2), ("attention", 1)])
def test_activation_checkpointing_changes_no_bit(world, tmp_path, recompute, passes):
    """Dropout included: the second pass of a layer draws what the first did."""
    model = {"attention": "sdpa", "lora": LORA | {"dropout": 0.3}}
    kept = Run(tmp_path / "kept", world, settings(model=model))
    again = Run(tmp_path / "again", world, settings(model=model, activation_checkpointing=recompute))
    with Count() as once:
        kept.train(1)
    with Count() as more:
        again.train(1)
    assert (once.calls > 0, more.calls) == (True, passes * once.calls)
    assert kept.train(2) == again.train(2)
    assert equal(again.tensors(), kept.tensors()) == []


def test_dropout_is_drawn_from_the_step(world, tmp_path):
    none, some = (
        Run(tmp_path / str(share), world, settings(model={"lora": LORA | {"dropout": share}}))
        for share in (0.0, 0.5)
    )
    assert none.train(2)["loss"] != some.train(2)["loss"]


def test_with_adapters_a_checkpoint_holds_them_and_their_optimizer_alone(world, tmp_path):
    run = Run(tmp_path, world, settings(model={"lora": LORA}))
    before = run.tensors()
    run.train(2)
    changed = {name for name in equal(run.tensors(), before) if name.startswith("model.")}
    assert len(changed) == 2 * 2 * 2  # two layers, two targets, two matrices each
    assert all(".lora_" in name for name in changed)
    held = plain_dcp(run.save() / "trainer")
    assert {name for name in held if name.startswith("model.")} == changed
    states = {
        f"{n.replace('model.', 'optimizer.', 1)}.{s}" for n in changed for s in ("exp_avg", "exp_avg_sq")
    }
    assert {name for name in held if name.startswith("optimizer.")} == states


def test_another_base_is_refused_by_its_digest(world, tmp_path):
    """The same shapes, one number of one matrix changed."""
    base = tmp_path / "base"
    shutil.copytree("examples/reverse_text/model", base)
    whole = dict(build(settings().model, seed=0).named_parameters())
    save_file({name: p.detach() for name, p in whole.items()}, base / "model.safetensors")
    config = settings(model={"lora": LORA, "name": str(base), "random_init": False})
    run = Run(tmp_path / "run", world, config)
    run.train(1)
    run.save()
    changed = {name: p.detach().clone() for name, p in whole.items()}
    changed["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(changed, base / "model.safetensors")
    again = Run(tmp_path / "run", world, config, attempt=2)
    with pytest.raises(Refusal, match="restore the files of the base model"):
        again.restore(1)


def test_exported_adapters_load_in_peft_and_give_the_logits_of_the_merged_model(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree("examples/reverse_text/model", base)
    whole = build(settings().model, seed=0)
    save_file({name: p.detach() for name, p in whole.named_parameters()}, base / "model.safetensors")
    config = settings(model={"lora": LORA, "name": str(base), "random_init": False})
    run = Run(tmp_path / "run", world, config)
    run.train(3)
    checkpoint = run.save()
    model, lora = config.model, config.model.lora
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    tensors.export_adapter(checkpoint, tmp_path / "adapter", model, lora, dtype="float32")
    tensors.export_merged(checkpoint, tmp_path / "merged", model, lora, seed=0, dtype="float32")
    published = adapters.merged(tensors.full_tensors(run.model), lora)
    assert equal(load_file(tmp_path / "merged" / "model.safetensors"), published) == []

    ids = torch.tensor([[5, 9, 33, 2, 17]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(by_peft(ids).logits, merged, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_transformers(ids).logits, merged, rtol=0, atol=1e-5)
    assert not torch.allclose(whole(ids).logits, merged, atol=1e-2)  # it has learnt something
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], sorted(stated["target_modules"])) == (
        4,
        12,
        ["q_proj", "up_proj"],
    )


def test_an_adapter_that_was_not_trained_leaves_the_base_as_it_is():
    config = settings(model={"lora": LORA})
    model, _ = build_trainable(config.model, seed=0)
    merged = adapters.merged(tensors.full_tensors(model), config.model.lora)
    assert equal(merged, tensors.full_tensors(build(config.model, seed=0))) == []


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["qkv_proj"], "has no linear layer of that name; it has down_proj, gate_proj, k_proj"),
        (["lm_head"], "whose weight is also the embedding's"),
    ],
)
def test_targets_that_cannot_have_an_adapter_are_refused(targets, says):
    with pytest.raises(Refusal, match=says):
        build_trainable(settings(model={"lora": {"target_modules": targets}}).model, seed=0)


def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state(world, tmp_path):
    run = Run(tmp_path, world, settings(model={"freeze": [r"layers\.0\.", "norm"]}))
    before = run.tensors()
    run.train(3)
    after = run.tensors()
    frozen = {name for name, _ in run.model.named_parameters() if "layers.0." in name or "norm" in name}
    moved = {name.removeprefix("model.") for name in equal(after, before) if name.startswith("model.")}
    assert moved == dict(run.model.named_parameters()).keys() - frozen
    held = plain_dcp(run.save() / "trainer")
    assert {f"model.{name}" for name in frozen} <= held.keys()
    assert not [name for name in held if name.startswith("optimizer.") and any(f in name for f in frozen)]


def test_a_shared_parameter_is_frozen_by_either_name_saved_once_and_shared_after_a_restore(world, tmp_path):
    run = Run(tmp_path, world, settings(model={"freeze": ["^lm_head"]}))
    before = run.tensors()
    run.train(2)
    assert torch.equal(run.tensors()[f"model.{EMBEDDING}"], before[f"model.{EMBEDDING}"])
    free = Run(tmp_path / "free", world, settings())
    free.train(2)
    schema = durable.read_manifest(free.save()).meta["schema"]
    assert f"model.{EMBEDDING}" in schema
    assert not [name for name in schema if "lm_head" in name]
    again = Run(tmp_path / "free", world, settings(), attempt=2)
    again.restore(2)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert equal(again.tensors(), free.tensors()) == []


@pytest.mark.parametrize(
    ("patterns", "says"),
    [(["head_of"], "is found in no parameter's name"), (["."], "leaves nothing to train")],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(patterns, says):
    with pytest.raises(Refusal, match=says):
        build_trainable(settings(model={"freeze": patterns}).model, seed=0)


@pytest.mark.parametrize(
    ("model", "says"),
    [({"freeze": ["("]}, "not a regular expression"), ({"freeze": ["x"], "lora": {}}, "exclude each other")],
)
def test_settings_that_make_no_sense_are_refused_where_they_are_read(model, says):
    with pytest.raises(ValueError, match=says):
        settings(model=model)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(("kind", "can_skip"), [("adamw", True), ("muon", False)])
def test_an_update_that_is_not_finite_changes_nothing(
    world, tmp_path, monkeypatch, kind, can_skip, cuda_graphs
):
    poisoned = False

    def choose(config):
        right = choose_loss(config)

        def loss(*given):
            found = right(*given)
            return dataclasses.replace(found, loss=found.loss * math.inf) if poisoned else found

        return loss

    monkeypatch.setattr(update, "choose_loss", choose)
    run = Run(tmp_path, world, settings(optim={"type": kind, "lr": 1e-2}, cuda_graphs=cuda_graphs))
    run.train(2)
    before, steps = run.tensors(), run.updater.optimizer.steps()
    before = {name: tensor.clone() for name, tensor in before.items()}
    poisoned = True
    assert run.updater.optimizer.can_skip is can_skip
    with pytest.raises(PoisonBatch, match="policy 2 was not changed"):
        run.train(1)
    assert equal(run.tensors(), before) == []
    assert run.updater.optimizer.steps() == steps
    poisoned = False
    through = Run(
        tmp_path / "through", world, settings(optim={"type": kind, "lr": 1e-2}, cuda_graphs=cuda_graphs)
    )
    through.train(2)
    assert run.train(1) == through.train(1)
    assert equal(run.tensors(), through.tensors()) == []


@pytest.mark.parametrize("file", range(shards.FILES))
def test_a_shard_that_cannot_be_written_by_either_thread_fails_the_save(world, tmp_path, monkeypatch, file):
    run = Run(tmp_path, world, settings())
    run.train(1)
    with monkeypatch.context() as patched:
        patched.setattr(shards.durable, "SealedFile", full_disk(f"_{file}.distcp"))
        assert not run.save().exists()
    durable.verify(run.save())


def full_disk(ending):
    class Full(durable.SealedFile):
        def __init__(self, path):
            super().__init__(path)
            self.is_full = path.name.endswith(ending)

        def write(self, data, /):
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    return Full


@pytest.mark.parametrize("save_async", [False, True])
def test_a_save_beside_the_training_writes_the_same_bytes(world, tmp_path, save_async):
    """The same files, whether both are written at once or one after the other."""
    run = Run(tmp_path, world, settings().model_copy(update={"ckpt": CkptConfig(save_async=save_async)}))
    run.train(1)
    directory = run.save()
    run.checkpointer.close()
    names = sorted(path.name for path in (directory / "trainer").glob("*.distcp"))
    assert names == [f"__0_{file}.distcp" for file in range(shards.FILES)]
    plain = Run(tmp_path / "plain", world, settings())
    plain.train(1)
    other = plain.save()
    assert all(
        (directory / "trainer" / n).read_bytes() == (other / "trainer" / n).read_bytes() for n in names
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("file", range(shards.FILES))
def test_a_shard_that_cannot_be_opened_by_either_thread_fails_the_save(
    world, tmp_path, monkeypatch, file, hides
):
    """Also where the thread that failed has left no word."""

    class Unopened(durable.SealedFile):
        def __init__(self, path):
            if path.name.endswith(f"_{file}.distcp"):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().__init__(path)

    run = Run(tmp_path, world, settings())
    run.train(1)
    with monkeypatch.context() as patched:
        patched.setattr(shards.durable, "SealedFile", Unopened)
        if hides:
            patched.setattr(
                shards._SealedShards, "error", property(lambda s: None, lambda s, e: None), raising=False
            )
        assert not run.save().exists()
    durable.verify(run.save())
