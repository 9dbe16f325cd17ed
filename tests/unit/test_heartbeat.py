"""Signs of life: a slow program gives them, one whose event loop hangs does not, a replaced one ends."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from ratchet import heartbeat
from ratchet.errors import EXIT_FENCED, Fenced
from ratchet.heartbeat import Heartbeat
from ratchet.paths import RunPaths
from ratchet.stage import Stage


@pytest.fixture
def stage(tmp_path):
    paths = RunPaths(tmp_path)
    paths.staging.mkdir()
    return Stage.open(paths, "001.trainer.1")


def test_a_busy_main_thread_gives_signs_of_life(stage, monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.05)
    assert heartbeat.last_beat(stage.directory) is None
    Heartbeat(stage).start()
    first = heartbeat.last_beat(stage.directory)
    deadline = time.monotonic() + 5
    while heartbeat.last_beat(stage.directory) == first:
        sum(range(10_000))
        assert time.monotonic() < deadline


async def test_a_loop_that_hangs_is_late_and_one_that_turns_is_not(stage, monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.02)
    monkeypatch.setattr(heartbeat, "LATE_TICK_S", 0.3)
    beat = Heartbeat(stage)
    assert not beat.is_late
    beat.follow(asyncio.get_running_loop())
    await asyncio.sleep(0.5)
    assert not beat.is_late
    time.sleep(0.5)  # a deadlock in the loop's thread
    assert beat.is_late


async def test_what_is_asked_and_does_not_answer_is_late_although_the_loop_turns(stage, monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.02)
    monkeypatch.setattr(heartbeat, "LATE_TICK_S", 0.3)
    beat, answers = Heartbeat(stage), asyncio.Event()
    answers.set()
    following = asyncio.create_task(beat.follow_answers(answers.wait))
    await asyncio.sleep(0.5)
    assert not beat.is_late
    answers.clear()
    await asyncio.sleep(0.5)
    assert beat.is_late
    answers.set()
    await asyncio.sleep(0.2)
    assert not beat.is_late
    following.cancel()


def test_a_process_that_was_replaced_before_it_began_does_not_begin(stage, tmp_path):
    Stage.open(RunPaths(tmp_path), "001.launcher.0").revoke("001.trainer.")
    with pytest.raises(Fenced):
        Heartbeat(stage).start()


def test_a_process_that_is_replaced_ends_by_itself_whatever_it_does(stage, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ratchet import heartbeat\n"
        "from ratchet.stage import Stage; from ratchet.paths import RunPaths\n"
        f"heartbeat.start(Stage(RunPaths(Path({str(tmp_path)!r})), '001.trainer.1'))\n"
        "print('on', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"on\n"
    launcher = Stage.open(RunPaths(tmp_path), "001.launcher.0")
    launcher.revoke("001.trainer.")
    assert process.wait(timeout=10) == EXIT_FENCED
    process.stdout.close()
    assert os.listdir(tmp_path / "staging") == ["001.launcher.0"]
