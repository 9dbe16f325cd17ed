"""Policies in shared memory: the same bytes as on the disk, pages that are used again, and never under a reader."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from ratchet import durable, weights
from ratchet.attempts import Assignment, Plan
from ratchet.inference import adoption
from ratchet.models import build
from ratchet.paths import RunPaths
from ratchet.stage import Stage
from ratchet.trainer.shelf import Shelf
from training import settings


@pytest.fixture
def shm():
    """A directory of a tmpfs: the kernel's answers to what is mapped are those of where it is used."""
    directory = Path(tempfile.mkdtemp(prefix="ratchet-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def assignment(tmp_path):
    paths = RunPaths(tmp_path)
    for directory in (paths.staging, paths.weights):
        directory.mkdir()
    stage = Stage.open(paths, "001.trainer.1")
    return Assignment(
        paths=paths, config=settings(), plan=Plan(), attempt=1, run_id="r", lineage=0, stage=stage
    )


@pytest.fixture
def shelf(assignment, shm):
    return Shelf(assignment, RunPaths(shm))


def policy(value, size=1000):
    return {"b": torch.full((size,), float(value)), "a": torch.arange(6).reshape(2, 3)}


def inode(shelf, step):
    return (shelf.paths.weight(step) / build.WEIGHTS).stat().st_ino


def held(shelf, step):
    directory = shelf.paths.weight(step)
    return adoption.read_tensors(directory, durable.read_manifest(directory))


def test_a_policy_in_memory_has_the_digest_that_it_has_on_the_disk(assignment, shelf):
    assert shelf.publish(policy(1), 1) is False
    directory = assignment.stage.begin("weights_1")
    build.save(directory, policy(1), assignment.config.model)
    on_disk = weights.commit(assignment.stage, directory, step=1, attempt=1)
    assert durable.verify(shelf.paths.weight(1)) == on_disk


def test_pages_of_a_policy_that_is_gone_are_filled_again(shelf):
    shelf.publish(policy(1), 1)
    shelf.publish(policy(2), 2)
    first, second = inode(shelf, 1), inode(shelf, 2)
    assert first != second
    shelf.prune(2, keep=())
    shelf.publish(policy(3), 3)
    assert inode(shelf, 3) == first
    assert [held(shelf, step)["b"][0] for step in (2, 3)] == [2.0, 3.0]
    assert durable.steps(shelf.paths.weights) == [2, 3]
    durable.verify(shelf.paths.weight(3))


def test_pages_that_a_reader_has_mapped_are_left_to_it(shelf):
    shelf.publish(policy(1), 1)
    reader, first = held(shelf, 1), inode(shelf, 1)
    shelf.prune(2, keep=())
    shelf.publish(policy(2), 2)
    assert inode(shelf, 2) != first
    assert set(reader["b"].tolist()) == {1.0}
    shelf.prune(3, keep=())  # this one nobody reads
    second = shelf._spare[1].stat().st_ino
    shelf.publish(policy(3), 3)
    assert inode(shelf, 3) == second


def test_pages_of_another_size_are_given_back(shelf):
    shelf.publish(policy(1), 1)
    shelf.prune(2, keep=())
    shelf.publish(policy(2, size=5000), 2)
    assert held(shelf, 2)["b"].shape == (5000,)
    workshop = shelf.paths.staging / "001.trainer.1"
    assert list(workshop.iterdir()) == []


def test_one_file_is_kept_for_the_next_policy_and_no_more(shelf):
    for step in range(4):
        shelf.publish(policy(step), step)
    shelf.prune(3, keep={1})
    assert durable.steps(shelf.paths.weights) == [1, 3]
    (spare,) = (shelf.paths.staging / "001.trainer.1").iterdir()
    assert spare.name == "spare-0"
    assert set(shelf._files) == {1, 3}


def test_the_same_policy_again_changes_nothing_and_another_one_takes_its_place(shelf):
    shelf.publish(policy(1), 1)
    before = inode(shelf, 1)
    assert shelf.publish(policy(1), 1) is False
    assert inode(shelf, 1) == before
    assert shelf.publish(policy(2), 1) is True
    assert held(shelf, 1)["b"][0] == 2.0


def test_a_trainer_that_takes_over_leaves_what_it_did_not_write_to_the_kernel(assignment, shelf, shm):
    shelf.publish(policy(1), 1)
    shelf.publish(policy(2), 2)
    stage = Stage.open(assignment.paths, "001.trainer.2")
    later = Assignment(**{**vars(assignment), "stage": stage})
    other = Shelf(later, RunPaths(shm))
    assert other.publish(policy(2), 2) is False
    other.prune(2, keep=())
    assert durable.steps(shelf.paths.weights) == [2]
    other.publish(policy(3), 3)
    assert held(other, 3)["b"][0] == 3.0
