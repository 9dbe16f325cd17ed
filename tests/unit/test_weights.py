"""Where a policy lies: in memory first, then on the disk; by its digest, never by its step alone."""

import pytest

from ratchet import weights
from ratchet.paths import RunPaths
from ratchet.stage import Stage
from ratchet.weights import Places


@pytest.fixture
def disk(tmp_path):
    return made(tmp_path / "run")


@pytest.fixture
def memory(tmp_path):
    return made(tmp_path / "shm")


def made(root):
    paths = RunPaths(root)
    for directory in (paths.staging, paths.weights):
        directory.mkdir(parents=True)
    return paths


def publish(paths, step, content=""):
    stage = Stage.open(paths, f"{step:03d}.trainer.1")
    directory = stage.begin("weights")
    (directory / "config.json").write_text(content)
    weights.commit(stage, directory, step=step, attempt=1)


def read(places, step):
    return places.read_policy(step, run_id="r", lineage=2)


def test_a_policy_has_one_name_wherever_it_lies(disk, memory):
    publish(disk, 1, "a")
    publish(memory, 1, "a")
    names = {str(read(places, 1)) for places in (Places(disk), Places(disk, memory), Places(memory))}
    assert len(names) == 1
    assert names.pop().startswith("r/2/1/")


def test_memory_comes_first_and_the_disk_where_memory_has_nothing(disk, memory):
    publish(disk, 0, "old")
    publish(memory, 0, "new")
    publish(disk, 1)
    places = Places(disk, memory)
    assert places.directories(read(places, 0)) == [memory.weight(0)]
    assert places.directories(read(places, 1)) == [disk.weight(1)]
    assert read(places, 2) is None
    publish(memory, 1)
    assert places.directories(read(places, 1)) == [memory.weight(1), disk.weight(1)]
    assert places.steps() == [0, 1]
    assert [places.is_published(step) for step in (0, 1, 2)] == [True, True, False]


def test_a_directory_that_holds_another_policy_of_the_step_is_never_given_out(disk, memory):
    """A trainer that was started again made the step anew, not bit by bit; the disk has still what was before."""
    publish(disk, 3, "before")
    publish(memory, 3, "after")
    places = Places(disk, memory)
    before = read(Places(disk), 3)
    assert places.directories(read(places, 3)) == [memory.weight(3)]
    assert places.directories(before) == [disk.weight(3)]


def test_on_the_disk_the_newest_is_found_from_one_step_to_the_next(disk):
    for step in (0, 1, 2, 4):
        publish(disk, step)
    assert Places(disk).newest(above=0) == 2
    assert Places(disk).newest(above=2) is None


def test_in_memory_the_newest_is_found_over_gaps_and_the_disk_is_not_asked(disk, memory):
    """A trainer that replays the log lets go of steps that nobody has looked for yet."""
    for step in (5, 8, 9):
        publish(memory, step)
    publish(disk, 12)
    (memory.weights / "step_10").mkdir()  # damaged
    places = Places(disk, memory)
    assert [places.newest(above=step) for step in (4, 8, 9)] == [9, 9, None]


def test_what_memory_has_not_passed_may_still_come_whatever_the_disk_holds(disk, memory):
    publish(disk, 9)
    assert Places(disk).is_passed(8)
    places = Places(disk, memory)
    assert not places.is_passed(8)
    publish(memory, 8)
    assert not places.is_passed(8)
    publish(memory, 9)
    assert places.is_passed(8)
