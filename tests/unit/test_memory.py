"""A run's part of the shared memory: who holds it, what ends it, and that there is one fence for both places."""

import os
import shutil

import pytest

from ratchet import memory, resume, weights
from ratchet.config import ModelConfig, RLConfig, SFTConfig
from ratchet.errors import Fenced, RatchetError, Refusal
from ratchet.launch.opening import open_attempt
from ratchet.memory import Memory, MemoryStage
from ratchet.paths import RunPaths
from ratchet.stage import Stage


@pytest.fixture
def config(tmp_path):
    (tmp_path / "shm").mkdir()
    return RLConfig(
        model=ModelConfig(name="m"),
        max_steps=4,
        output_dir=tmp_path / "run",
        weights={"transport": "memory", "memory_dir": str(tmp_path / "shm")},
    )


@pytest.fixture
def launcher(tmp_path):
    paths = RunPaths(tmp_path / "run")
    for directory in (paths.staging, paths.weights):
        directory.mkdir(parents=True)
    return Stage.open(paths, "001.launcher.0")


def by_disk(config):
    return config.model_copy(update={"weights": type(config.weights)(memory_dir=config.weights.memory_dir)})


def staged(stage, content="x"):
    directory = stage.begin("weights_1")
    (directory / "config.json").write_text(content)
    return directory


def put(stage, step=1):
    weights.commit(stage, staged(stage), step=step, attempt=1)


def die(held):
    """What the kernel does when a launcher is killed."""
    held._owner.close()


def below(config):
    return sorted(path.name for path in config.weights.memory_dir.iterdir())


def test_policies_that_go_by_the_disk_have_no_place_in_memory(config):
    assert memory.find(by_disk(config), "r", 1) is None
    assert Memory.open(by_disk(config), "r", 1) is None
    sft = SFTConfig(model=ModelConfig(name="m"), max_steps=1, data={"name": "x"})
    assert memory.find(sft, "r", 1) is None
    assert Memory.open(sft, "r", 1) is None
    assert below(config) == []


def test_each_attempt_begins_with_nothing_in_memory(config):
    first = Memory.open(config, "r", 1)
    paths = memory.find(config, "r", 1)
    (paths.weights / "step_3").mkdir()
    die(first)
    second = Memory.open(config, "r", 2)
    assert below(config) == [f"ratchet-{os.getuid()}-r"]
    assert not paths.root.exists()
    assert list(memory.find(config, "r", 2).weights.iterdir()) == []
    second.close()
    assert below(config) == []


def test_what_an_attempt_left_goes_also_if_the_next_one_goes_by_the_disk(config):
    for run_id in ("r", "s"):
        die(Memory.open(config, run_id, 1))
    assert Memory.open(by_disk(config), "r", 2) is None
    assert below(config) == [f"ratchet-{os.getuid()}-s"]


def test_an_attempt_that_ends_gives_its_memory_back(config):
    opened = open_attempt("rl", config, lambda seen: None)
    assert below(config) == [f"ratchet-{os.getuid()}-{opened.record.run_id}"]
    assert memory.find(config, opened.record.run_id, 1).weights.is_dir()
    opened.close(0, "complete")
    assert below(config) == []


def test_memory_that_cannot_be_had_is_refused_with_the_remedy(config):
    shutil.rmtree(config.weights.memory_dir)
    with pytest.raises(Refusal, match=r"choose another weights\.memory_dir"):
        open_attempt("rl", config, lambda seen: None)


def test_an_attempt_that_cannot_begin_leaves_nothing_in_memory(config, monkeypatch):
    def fail(*arguments):
        assert below(config), "it was held already"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "apply", fail)
    with pytest.raises(OSError, match="No space"):
        open_attempt("rl", config, lambda seen: None)
    assert below(config) == []


def test_leftovers_are_those_that_no_launcher_holds(config):
    held, gone = Memory.open(config, "held", 1), Memory.open(config, "gone", 1)
    die(gone)
    (config.weights.memory_dir / f"ratchet-{os.getuid()}-halfway").mkdir()
    (config.weights.memory_dir / "another").mkdir()
    found = [path.name for path in memory.leftovers(config.weights.memory_dir)]
    assert found == [f"ratchet-{os.getuid()}-{name}" for name in ("gone", "halfway")]
    held.close()


def test_revoking_a_trainer_on_the_disk_ends_its_workshop_in_memory(config, launcher):
    paths = memory.find(config, "r", 1)
    stage = MemoryStage.join(paths, launcher.open_for("001.trainer.1"))
    put(stage)
    directory = staged(stage)
    launcher.revoke("001.trainer.")
    with pytest.raises(Fenced):
        weights.commit(stage, directory, step=2, attempt=1)
    with pytest.raises(Fenced):
        stage.begin("weights_3")
    for take in (stage.withdraw, stage.remove):
        with pytest.raises(Fenced):
            take(paths.weight(1))
    assert [path.name for path in paths.weights.iterdir()] == ["step_1"]


def test_a_workshop_that_is_made_again_under_the_same_name_lets_nobody_through(config, launcher):
    paths = memory.find(config, "r", 1)
    stage = MemoryStage.join(paths, launcher.open_for("001.trainer.1"))
    directory = staged(stage)
    launcher.revoke("001.trainer.")
    stage._disk.directory.mkdir()
    (stage._disk.directory / "memory").symlink_to(stage.directory)
    with pytest.raises(Fenced):
        weights.commit(stage, directory, step=1, attempt=1)


def test_a_trainer_that_takes_over_keeps_the_policies_and_clears_the_workshop(config, launcher):
    paths = memory.find(config, "r", 1)
    old = MemoryStage.join(paths, launcher.open_for("001.trainer.1"))
    put(old)
    staged(old)
    launcher.revoke("001.trainer.")
    new = MemoryStage.join(paths, launcher.open_for("001.trainer.2"))
    assert [path.name for path in paths.staging.iterdir()] == ["001.trainer.2"]
    assert weights.is_published(paths, 1)
    put(new, step=2)
    with pytest.raises(Fenced):
        MemoryStage.join(paths, old._disk)


def test_memory_that_something_swept_is_said_and_a_new_trainer_begins_anew(config, launcher):
    paths = memory.find(config, "r", 1)
    stage = MemoryStage.join(paths, launcher.open_for("001.trainer.1"))
    shutil.rmtree(paths.root.parent)
    with pytest.raises(RatchetError, match="enable-linger") as error:
        stage.begin("weights_1")
    assert not isinstance(error.value, Fenced), "it would not be started again"
    put(MemoryStage.join(paths, launcher.open_for("001.trainer.2")))
    assert weights.is_published(paths, 1)


def test_what_is_withdrawn_is_found_by_nobody_and_kept(config, launcher):
    paths = memory.find(config, "r", 1)
    stage = MemoryStage.join(paths, launcher.open_for("001.trainer.1"))
    put(stage)
    place = stage.withdraw(paths.weight(1))
    assert not weights.is_published(paths, 1)
    assert (place / "config.json").read_text() == "x"
    assert stage.withdraw(paths.weight(1)) is None
    stage.hand_on(place / "config.json", stage.directory / "spare")
    assert (stage.directory / "spare").read_text() == "x"


def test_a_configuration_file_names_the_same_place(config):
    assert memory.find_by({"weights": config.weights.model_dump(mode="json")}, "r", 7) == memory.find(
        config, "r", 7
    )
    assert memory.find_by({}, "r", 7) is None


def outliving(**changes):
    config = RLConfig.model_validate(
        {
            "model": ModelConfig(name="m"),
            "max_steps": 20,
            "weights": {"transport": "memory", "publish_interval": 7},
        }
        | changes
    )
    return [step for step in range(config.max_steps + 1) if memory.outlives(config, step)]


def test_the_policies_that_outlive_an_attempt_are_those_that_a_resume_needs():
    assert outliving() == [0, 7, 14, 20]
    assert outliving(ckpt={"interval": 9}) == [0, 7, 9, 14, 18, 20]
    exact = {"deterministic": True, "max_async_level": 2}
    assert outliving(ckpt={"interval": 9}, **exact) == [0, 7, 8, 9, 14, 16, 17, 18, 19, 20]
    evaluated = {"orchestrator": {"eval": {"interval": 5, "at_start": False}}}
    assert outliving(**evaluated) == [0, 5, 7, 10, 14, 15, 20]
    assert outliving(weights={"transport": "memory"}) == list(range(21))


def test_what_a_killed_attempt_left_is_gone_before_the_next_one_looks_for_room(config, tmp_path):
    """Also where the next one goes to another directory."""
    first = open_attempt("rl", config, lambda seen: None)
    assert below(config) != []
    die(first.memory)
    first.lock.release()
    other = tmp_path / "other"
    other.mkdir()
    moved = config.model_copy(update={"weights": config.weights.model_copy(update={"memory_dir": other})})
    seen = []

    def look_for_room(inputs):
        seen.append(below(config))

    second = open_attempt("rl", moved, look_for_room)
    assert seen == [[]]
    assert below(moved) != []
    second.memory.close()
    second.lock.release()
