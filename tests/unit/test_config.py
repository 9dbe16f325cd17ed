"""The configuration: one value for a fact, one sentence for a mistake, a mark on every key."""

import pytest

from ratchet import config_io
from ratchet.config import ClientConfig, OnResume, RLConfig, SFTConfig, TrainerConfig
from ratchet.errors import Refusal

TRAIN = """
max_steps = 20
output_dir = "outputs/x"
micro_batch_tokens = 100
[model]
name = "m"
[optim]
lr = 1e-3
"""
ORCH = """
max_steps = 20
batch_size = 8
group_size = 4
[[env]]
id = "reverse_text"
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train.toml").write_text(TRAIN)
    (tmp_path / "orch.toml").write_text(ORCH)
    return tmp_path


def split(files, *more):
    return [
        "--trainer", "@", str(files / "train.toml"), "--orchestrator", "@", str(files / "orch.toml"), *more
    ]  # fmt: skip


def test_root_facts_in_the_split_files_are_hoisted(files):
    loaded = config_io.load(RLConfig, split(files))
    assert (loaded.max_steps, loaded.model.name, loaded.trainer.micro_batch_tokens) == (20, "m", 100)
    assert loaded.orchestrator.groups_per_batch == 2


def test_the_command_line_overrides_both_files(files):
    assert config_io.load(RLConfig, split(files, "--max-steps", "10")).max_steps == 10


def test_two_values_for_one_fact_are_refused(files):
    (files / "orch.toml").write_text(ORCH.replace("20", "30"))
    with pytest.raises(Refusal, match=r"max_steps is 20 in .*train.toml and 30 in .*orch.toml"):
        config_io.load(RLConfig, split(files))


def test_bare_ckpt_and_any_ckpt_flag_turn_checkpoints_on(files):
    assert config_io.load(RLConfig, split(files)).ckpt is None
    bare = config_io.load(RLConfig, split(files, "--ckpt")).ckpt
    assert bare is not None
    assert (bare.interval, bare.resume_step) == (None, None)
    flags = ("--ckpt.interval", "2", "--ckpt.save-async", "--ckpt.keep-last", "3", "--ckpt.resume-step", "-1")
    full = config_io.load(RLConfig, split(files, *flags)).ckpt
    assert full is not None
    assert (full.interval, full.save_async, full.keep_last, full.resume_step) == (2, True, 3, -1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--ckpt.intervall", "2"), r"--ckpt.intervall.*did you mean --ckpt.interval\?"),
        (("--trainer.optim.lrr", "2"), r"did you mean --trainer.optim.lr\?"),
        (("--max-stepz", "2"), r"did you mean --max-steps\?"),
        (("--max-steps", "0"), "--max-steps: .*greater than or equal to 1"),
        (("--max-steps", "many"), "--max-steps: .*valid integer"),
        (("--ckpt.interval", "0"), "--ckpt.interval"),
        (("--orchestrator.group-size", "3"), "batch_size 8 must be a multiple of group_size 3"),
        (("--orchestrator.group-size", "1"), "at least 2"),
        (("@", "none.toml"), "none.toml"),
    ],
)
def test_a_mistake_is_one_sentence(files, flags, sentence):
    with pytest.raises(Refusal, match=sentence) as caught:
        config_io.load(RLConfig, split(files, *flags))
    assert "\n" not in str(caught.value)


def test_toml_and_back_is_the_same_configuration(files, tmp_path):
    loaded = config_io.load(RLConfig, split(files, "--ckpt.keep-last", "2"))
    (tmp_path / "run.toml").write_bytes(config_io.to_toml(loaded))
    assert config_io.from_toml(RLConfig, tmp_path / "run.toml") == loaded


def test_changes_are_told_with_their_mark(files):
    old = config_io.load(RLConfig, split(files))
    new = config_io.load(
        RLConfig, split(files, "--max-steps", "40", "--trainer.optim.lr", "0.5", "--seed", "3")
    )
    found = {change.key: (change.old, change.new, change.mark) for change in config_io.changes(old, new)}
    assert found == {
        "max_steps": (20, 40, OnResume.FREE),
        "trainer.optim.lr": (0.001, 0.5, OnResume.ANNOUNCED),
        "seed": (0, 3, OnResume.FIXED),
    }


def test_the_async_level_is_fixed_in_deterministic_mode(files):
    old = config_io.load(RLConfig, split(files, "--deterministic"))
    new = config_io.load(RLConfig, split(files, "--deterministic", "--max-async-level", "3"))
    assert [change.mark for change in config_io.changes(old, new)] == [OnResume.FIXED]


def test_every_leaf_has_a_mark():
    for cls in (RLConfig, SFTConfig):
        assert all(isinstance(mark, OnResume) for mark in config_io.marks(cls).values())


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ([], ["http://127.0.0.1:8000"]),
        (["http://a:1/"], ["http://a:1"]),
        (["http://a:1", "http://b:2"], ["http://a:1", "http://b:2"]),
    ],
)
def test_servers_are_one_url_or_several(files, given, urls):
    flags = ["--orchestrator.client.base-url", *given] if given else []
    assert config_io.load(RLConfig, split(files, *flags)).orchestrator.client.base_url == urls


def test_a_file_may_name_one_server_as_text():
    assert ClientConfig.model_validate({"base_url": "http://a:1"}).base_url == ["http://a:1"]


def test_a_server_that_is_named_twice_is_refused(files):
    with pytest.raises(Refusal, match="names a server twice"):
        config_io.load(RLConfig, split(files, "--orchestrator.client.base-url", "http://a:1", "http://a:1/"))


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"nproc": 3, "parallel": {"replicate": 2}}, r"replicate 2 must divide the 3 processes"),
        ({"nnodes": 2, "rendezvous": "a:1", "node_rank": 2}, r"node_rank 2 must be below nnodes 2"),
        ({"nnodes": 2, "rendezvous": "host"}, r"rendezvous must be 'HOST:PORT'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(trainer, says):
    with pytest.raises(ValueError, match=says):
        TrainerConfig.model_validate(trainer)


def test_what_is_frozen_or_adapted_may_not_change_within_a_run():
    model = {"name": "m"}
    old, new, lora = (
        SFTConfig.model_validate({"model": model | more, "max_steps": 1, "data": {"name": "d"}})
        for more in ({"freeze": ["embed"]}, {"freeze": ["embed", "norm"]}, {"lora": {"rank": 8}})
    )
    (change,) = config_io.changes(old, new)
    assert (str(change), change.mark) == ("model.freeze: ['embed'] -> ['embed', 'norm']", OnResume.FIXED)
    found = {c.key: c.mark for c in config_io.changes(old, lora)}
    assert found["model.lora.rank"] is found["model.lora.target_modules"] is OnResume.FIXED


def test_a_publish_interval_needs_memory_and_one_machine(files):
    by_memory = ("--weights.transport", "memory", "--weights.publish-interval", "3")
    assert config_io.load(RLConfig, split(files, *by_memory)).weights.publish_interval == 3
    with pytest.raises(Refusal, match="publish_interval 3 needs transport = 'memory'"):
        config_io.load(RLConfig, split(files, *by_memory[2:]))
    with pytest.raises(Refusal, match=r"publish_interval must be 1 with --slurm"):
        config_io.load(RLConfig, split(files, *by_memory, "--slurm"))
    config_io.load(RLConfig, split(files, *by_memory, "--slurm.executor", "local"))
    config_io.load(RLConfig, split(files, *by_memory[:2], "--slurm"))


def test_the_way_of_policies_may_change_on_resume():
    table = config_io.marks(RLConfig)
    assert {table[f"weights.{name}"] for name in ("transport", "publish_interval", "memory_dir")} == {
        OnResume.FREE
    }


def test_only_where_one_policy_samples_each_batch_a_resume_needs_those_before_its_checkpoint():
    settings = {"model": {"name": "m"}, "max_steps": 1, "max_async_level": 3}
    assert RLConfig.model_validate(settings).ahead == 0
    assert RLConfig.model_validate(settings | {"deterministic": True}).ahead == 3
