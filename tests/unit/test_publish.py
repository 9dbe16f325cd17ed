"""Policies are published beside the training: what they hold, in which order, and how a failure is told."""

import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ratchet import durable, weights
from ratchet.attempts import Assignment, Plan
from ratchet.config import RLConfig
from ratchet.models.device import choose
from ratchet.timeline import Timeline
from ratchet.trainer import publish
from ratchet.trainer.publish import Publisher
from ratchet.trainer.world import open_world
from training import Run, settings


@pytest.fixture
def run(tmp_path):
    world = open_world(choose("cpu"))
    run = Run(tmp_path, world, settings())
    run.paths.weights.mkdir()
    yield run
    dist.destroy_process_group()


@pytest.fixture
def publisher(run):
    assignment = Assignment(
        paths=run.paths,
        config=run.config,
        plan=Plan(),
        attempt=1,
        run_id="x",
        lineage=0,
        stage=run.checkpointer._assignment.stage,
    )
    return Publisher(assignment, run.checkpointer._world, Timeline(None))


def test_a_policy_is_that_of_its_step_however_long_writing_takes(run, publisher, monkeypatch):
    may_write, write = threading.Event(), publish.build.save

    def slowly(*arguments):
        assert may_write.wait(60)
        write(*arguments)

    monkeypatch.setattr(publish.build, "save", slowly)
    expected = {name: tensor.clone() for name, tensor in run.tensors().items() if name.startswith("model.")}
    publisher.publish(run.model, 0)
    run.train(1)  # the step goes on while policy 0 is written
    assert not weights.is_published(run.paths, 0)
    may_write.set()
    publisher.wait()
    found = load_file(run.paths.weight(0) / "model.safetensors")
    assert len(found) > 10
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[f"model.{name}"]), name


def test_each_policy_waits_for_the_one_before_it(run, publisher):
    seen = []
    for step in range(3):
        publisher.publish(
            run.model, step, lambda step=step: seen.append((step, weights.is_published(run.paths, step)))
        )
        run.train(1)
    publisher.wait()
    assert seen == [(0, True), (1, True), (2, True)]


def test_a_failure_is_told_once_without_waiting_for_the_next_policy(run, publisher, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.build, "save", fail)
    publisher.publish(run.model, 0)
    publisher.settle()
    with pytest.raises(OSError, match="No space"):
        publisher.poll()
    publisher.poll()


# -- through memory -----------------------------------------------------------------------------------------


@pytest.fixture
def shm():
    directory = Path(tempfile.mkdtemp(prefix="ratchet-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def travelling(run, shm):
    """A publisher whose policies go through memory; every third comes onto the disk."""
    config = RLConfig(
        model=run.config.model,
        max_steps=9,
        ckpt={"interval": 4},
        deterministic=True,
        weights={"transport": "memory", "publish_interval": 3, "memory_dir": str(shm)},
    )
    assignment = Assignment(
        paths=run.paths,
        config=config,
        plan=Plan(),
        attempt=1,
        run_id="x",
        lineage=0,
        stage=run.checkpointer._assignment.stage,
    )
    return Publisher(assignment, run.checkpointer._world, Timeline(None))


def in_memory(publisher):
    return durable.steps(publisher._assignment.memory.weights)


def test_by_memory_and_by_the_disk_a_policy_is_the_same(run, publisher, travelling):
    travelling.publish(run.model, 0)
    travelling.wait()
    by_memory = durable.verify(run.paths.weight(0))
    shutil.rmtree(run.paths.weight(0))
    publisher.publish(run.model, 0)
    publisher.wait()
    assert durable.verify(run.paths.weight(0)) == by_memory
    assert durable.verify(travelling._assignment.memory.weight(0)) == by_memory


def test_those_that_a_resume_needs_come_onto_the_disk(run, travelling):
    for step in range(7):
        travelling.publish(run.model, step)
    travelling.wait()
    assert in_memory(travelling) == list(range(7))
    # 0 and the multiples of 3; 4 has a checkpoint, whose first batch policy 3 samples.
    assert durable.steps(run.paths.weights) == [0, 3, 4, 6]


def test_nobody_waits_for_the_disk_but_a_checkpoint(run, travelling, monkeypatch):
    may_copy, copy = threading.Event(), durable.copy_file

    def slowly(*arguments):
        assert may_copy.wait(60)
        copy(*arguments)

    monkeypatch.setattr(durable, "copy_file", slowly)
    seen = []
    travelling.publish(run.model, 0, lambda: seen.append(0))
    travelling.publish(run.model, 1, lambda: (seen.append(1), travelling.prune(5, newest=2, ahead=1)))
    travelling.publish(run.model, 2, lambda: seen.append(2))
    travelling._publishing.join()
    assert seen == [0, 1, 2]
    assert durable.steps(run.paths.weights) == []
    assert in_memory(travelling) == [0, 1, 2], "what is being copied stays, and what a stop would need"
    may_copy.set()
    travelling.wait()
    assert durable.steps(run.paths.weights) == [0]
    travelling.prune(5, newest=2, ahead=1)
    assert in_memory(travelling) == [1, 2]


def test_a_stop_takes_from_memory_what_its_checkpoint_needs(run, travelling):
    for step in range(3):
        travelling.publish(run.model, step)
    travelling.keep(range(1, 3))
    assert durable.steps(run.paths.weights) == [0, 1, 2]
    for step in (1, 2):
        assert durable.verify(run.paths.weight(step)) == durable.verify(
            travelling._assignment.memory.weight(step)
        )


def test_a_policy_that_was_made_anew_takes_the_place_of_the_one_before_in_both(run, travelling, caplog):
    travelling.publish(run.model, 0)
    travelling.wait()
    before = durable.verify(run.paths.weight(0))
    run.train(1)
    travelling.publish(run.model, 0)
    travelling.wait()
    after = durable.verify(run.paths.weight(0))
    assert after != before
    assert durable.verify(travelling._assignment.memory.weight(0)) == after
    assert durable.verify(run.paths.superseded / "001" / "weights" / "step_0") == before
    assert caplog.text.count("replay is not bitwise here") == 1


def test_a_failure_of_the_copy_is_told_too(run, travelling, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "copy_file", fail)
    travelling.publish(run.model, 0)
    with pytest.raises(OSError, match="No space"):
        travelling.wait()
    assert in_memory(travelling) == [0]
