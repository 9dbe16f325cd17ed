"""Timelines and the moment's state: history for people, which survives whatever a power cut leaves of it."""

import pytest

from ratchet import now, timeline
from ratchet.now import Now
from ratchet.orchestrator.activity import Activity
from ratchet.paths import RunPaths
from ratchet.stage import Stage
from ratchet.timeline import Timeline


@pytest.fixture
def stage(tmp_path):
    paths = RunPaths(tmp_path)
    for part in (paths.staging, paths.timelines):
        part.mkdir()
    return Stage.open(paths, "002.orchestrator.3")


def phases(stage):
    found = timeline.read(stage.paths.timeline("orchestrator"))
    return [(span.phase, span.step) for span in found]


def test_a_phase_says_who_did_it(stage):
    with Timeline(stage).phase("eval", 7):
        pass
    (span,) = timeline.read(stage.paths.timeline("orchestrator"))
    assert (span.phase, span.step, span.attempt, span.incarnation) == ("eval", 7, 2, 3)
    assert timeline.roles(stage.paths) == ["orchestrator"]


def test_a_phase_that_fails_leaves_no_line(stage):
    with pytest.raises(KeyError), Timeline(stage).phase("eval", 7):
        raise KeyError
    assert phases(stage) == []


def test_lines_behind_a_torn_one_are_read(stage):
    line = Timeline(stage)
    line.add("batch", 1, 0.5)
    stage.append(stage.paths.timeline("orchestrator"), b"\0\0\0{\n")
    line.add("batch", 2, 0.5)
    assert phases(stage) == [("batch", 1), ("batch", 2)]


def test_a_program_without_a_workshop_writes_nothing(stage):
    Timeline(None).add("train", 1, 1.0)
    assert timeline.roles(stage.paths) == []


def test_generation_is_cut_where_a_batch_is_taken_and_where_nothing_is_in_flight(stage):
    activity = Activity(Timeline(stage))
    activity.see(4, 0)
    activity.see(3, 0)
    activity.end(3)  # batch 0 is taken, and 3 groups are in flight for the next
    activity.see(3, 1)
    activity.see(0, 1)
    activity.see(0, 1)
    activity.see(2, 2)
    activity.end(0)
    assert phases(stage) == [("generate", 1), ("generate", 2), ("generate", 3)]


def test_the_state_of_this_second_is_that_of_the_newest_orchestrator(stage):
    assert now.read(stage.paths) is None
    state = Now(policy=3, batch=4, groups_running=1, groups_ready=2, groups_wanted=4, rollouts_running=9)
    Activity(Timeline(stage)).tell(stage, state)
    assert now.read(stage.paths) == state
    (stage.directory / now.NAME).write_bytes(b'{"policy": 3, "ba')
    assert now.read(stage.paths) is None
