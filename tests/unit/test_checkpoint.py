"""Which checkpoints, policies and batches stay: small cases worked by hand."""

import pytest

from ratchet import checkpoint, durable
from ratchet.config import CkptConfig
from ratchet.paths import RunPaths
from ratchet.records import Manifest
from ratchet.stage import Stage


@pytest.fixture
def stage(tmp_path):
    paths = RunPaths(tmp_path)
    for directory in (paths.staging, paths.checkpoints, paths.weights, paths.batches):
        directory.mkdir()
    return Stage.open(paths, "001.trainer.1")


def publish(stage, root, *steps):
    for step in steps:
        directory = stage.begin("x")
        (directory / "data").write_text(str(step))
        manifest = Manifest(kind="x", step=step, attempt=1, files=tuple(durable.seal(directory)))
        stage.commit(directory, root / f"step_{step}", manifest)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [2, 4, 6, 8]),
        ({"keep_last": 1}, [8]),
        ({"keep_last": 3}, [4, 6, 8]),
        ({"keep_interval": 4}, [4, 8]),
        ({"keep_last": 2, "keep_interval": 4}, [4, 6, 8]),
        ({"keep_interval": 3}, [6, 8]),
    ],
)
def test_retention_keeps_what_the_rules_say_and_the_newest(stage, rules, kept):
    publish(stage, stage.paths.checkpoints, 2, 4, 6, 8)
    checkpoint.retain(stage, CkptConfig(**rules))
    assert list(durable.committed(stage.paths.checkpoints)) == kept


def prune(stage, **more):
    settings = {"published": 9, "oldest_served": 9, "async_level": 1} | more
    checkpoint.prune(stage, CkptConfig(), **settings)
    return list(durable.committed(stage.paths.weights))


def test_policies_of_a_checkpoint_and_those_that_sample_after_it_stay(stage):
    publish(stage, stage.paths.weights, *range(10))
    publish(stage, stage.paths.checkpoints, 4)
    assert prune(stage) == [3, 4, 9]


def test_a_save_in_flight_pins_what_its_checkpoint_will_need(stage):
    publish(stage, stage.paths.weights, *range(10))
    assert prune(stage, saving=6) == [5, 6, 9]


def test_a_policy_that_a_server_may_hold_stays(stage):
    publish(stage, stage.paths.weights, *range(10))
    assert prune(stage, oldest_served=7) == [7, 8, 9]


def test_a_newest_checkpoint_that_does_not_verify_lets_nothing_go(stage):
    publish(stage, stage.paths.checkpoints, 2, 4)
    (stage.paths.checkpoint(4) / "data").write_text("5")
    with pytest.raises(durable.Damaged):
        checkpoint.retain(stage, CkptConfig(keep_last=1))
    assert list(durable.committed(stage.paths.checkpoints)) == [2, 4]


def test_batches_stay_from_the_oldest_of_the_newest_sound_checkpoints_on(stage):
    publish(stage, stage.paths.batches, *range(10))
    publish(stage, stage.paths.checkpoints, 2, 4, 6, 8)
    (stage.paths.checkpoint(8) / "data").unlink()
    checkpoint.prune(stage, CkptConfig(keep_last=2), published=9, oldest_served=9, async_level=1)
    assert durable.steps(stage.paths.batches) == [4, 5, 6, 7, 8, 9]


def test_the_newest_policy_that_is_on_the_disk_stays_where_later_ones_went_through_memory(stage):
    publish(stage, stage.paths.weights, 0, 3, 6)
    assert prune(stage) == [6]
