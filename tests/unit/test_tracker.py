"""The follower of the metric files: no gap and no double point, whatever dies and wherever the run goes back to."""

import io
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from ratchet import metrics
from ratchet.errors import Fenced
from ratchet.paths import RunPaths
from ratchet.report.tracker.follow import Follower
from ratchet.report.tracker.tensorboard import TensorboardSink, record
from ratchet.stage import Stage


@pytest.fixture
def stage(tmp_path):
    paths = RunPaths(tmp_path)
    for part in (paths.staging, paths.metrics):
        part.mkdir()
    return Stage.open(paths, "001.tracker.1")


def row(stage, role, step, **values):
    metrics.append(stage, stage.paths.metric(role), {"step": step, **values})


def train(stage, steps, scale=1.0):
    for step in steps:
        row(stage, "trainer", step, loss=scale * step)


def place(stage):
    return stage.paths.trackers / "tensorboard"


@pytest.fixture
def follower():
    """Opens followers; they end with the test."""
    opened = []

    def follow(stage):
        opened.append(Follower(stage, [TensorboardSink(stage, place(stage))]))
        return opened[-1]

    yield follow
    for one in opened:
        one.close()


def curve(stage, tag="trainer/loss"):
    events = EventAccumulator(str(place(stage)), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 9])
def test_a_record_has_the_bytes_of_tensorboards_own_writer(data):
    file = io.BytesIO()
    RecordWriter(file).write(data)
    assert record(data) == file.getvalue()


def test_rows_are_copied_as_they_come(stage, follower):
    follow = follower(stage)
    train(stage, [1, 2])
    follow.look()
    train(stage, [3])
    follow.look()
    follow.save()
    assert curve(stage) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_follower_that_died_before_it_remembered_leaves_no_double_point(stage, follower):
    first = follower(stage)
    train(stage, [1, 2])
    first.look()
    first.save()
    train(stage, [3, 4])
    first.look()
    for sink in first._sinks:
        sink.flush()  # written, not remembered
    second = follower(stage)
    train(stage, [5])
    second.look()
    second.save()
    assert curve(stage) == [(step, float(step)) for step in range(1, 6)]


def test_files_that_are_at_different_steps_all_go_on_without_a_gap(stage, follower):
    first = follower(stage)
    train(stage, [1, 2])
    for step in (1, 2, 3, 4):
        row(stage, "orchestrator", step, **{"reward/mean": step / 10})
    first.look()
    first.save()
    second = follower(stage)
    train(stage, [3])
    second.look()
    second.save()
    assert [step for step, _ in curve(stage)] == [1, 2, 3]
    assert [step for step, _ in curve(stage, "orchestrator/reward/mean")] == [1, 2, 3, 4]


@pytest.mark.parametrize("is_the_same_follower", [True, False])
def test_a_rewound_curve_is_rewound(stage, follower, is_the_same_follower):
    follow = follower(stage)
    train(stage, [1, 2, 3, 4])
    follow.look()
    follow.save()
    metrics.rewind(stage, stage.paths.metric("trainer"), 2)
    train(stage, [3], scale=10)
    if not is_the_same_follower:
        follow = follower(stage)
    follow.look()
    follow.save()
    assert curve(stage) == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert len(list(place(stage).iterdir())) == 1, "files that say nothing any more are gone"


def test_a_rewind_that_changes_nothing_begins_no_new_file(stage, follower):
    follow = follower(stage)
    train(stage, [1, 2])
    follow.look()
    metrics.rewind(stage, stage.paths.metric("trainer"), 2)
    train(stage, [3])
    follow.look()
    follow.save()
    assert [step for step, _ in curve(stage)] == [1, 2, 3]
    assert len(list(place(stage).iterdir())) == 1


def test_a_row_that_is_half_written_waits_for_its_other_half(stage, follower):
    follow = follower(stage)
    path = stage.paths.metric("trainer")
    stage.append(path, b'{"step":1,"loss":1.0}\n{"step":2,"lo')
    follow.look()
    stage.append(path, b'ss":2.0}\n')
    follow.look()
    follow.save()
    assert curve(stage) == [(1, 1.0), (2, 2.0)]


def test_what_is_not_a_number_is_left_out(stage, follower):
    follow = follower(stage)
    stage.append(stage.paths.metric("trainer"), b'{"step":1,"loss":1.0,"note":"x","hole":null}\n')
    follow.look()
    follow.save()
    events = EventAccumulator(str(place(stage)))
    events.Reload()
    assert events.Tags()["scalars"] == ["trainer/loss"]


def test_a_follower_of_an_attempt_that_was_replaced_stops(stage, follower):
    follow = follower(stage)
    train(stage, [1])
    follow.look()
    shutil.rmtree(stage.directory)
    with pytest.raises(Fenced):
        follow.save()
