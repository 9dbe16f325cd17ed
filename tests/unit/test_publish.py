"""Policies are published beside the training: what they hold, in which order, and how a failure is told."""

import threading

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ratchet import weights
from ratchet.attempts import Assignment, Plan
from ratchet.timeline import Timeline
from ratchet.trainer import publish
from ratchet.trainer.publish import Publisher
from ratchet.trainer.world import open_world
from training import Run, settings


@pytest.fixture
def run(tmp_path):
    world = open_world("cpu")
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
