"""What the launcher makes of servers that die: one of several is given up, the last one is the end."""

import time
from types import SimpleNamespace

import pytest

from ratchet.config import LaunchConfig
from ratchet.errors import EXIT_CRASH, EXIT_REFUSED
from ratchet.launch.program import Recipe
from ratchet.launch.supervisor import Child, Supervisor


class Ended:
    """A program that has ended, or not: `code` is None."""

    def __init__(self, code):
        self.code = code
        self.is_alive = False

    def poll(self):
        return self.code

    def signal(self, number):
        pass

    def kill(self):
        pass


@pytest.fixture
def supervisor(tmp_path):
    """A trainer that works, and two servers that were started again too often already."""
    said = []
    console = SimpleNamespace(say=said.append, refresh=lambda: None)
    attempt = SimpleNamespace(config=SimpleNamespace(launch=LaunchConfig(max_restarts=2)))
    made = Supervisor(attempt, console)
    made.said = said
    for name in ("trainer", "inference_0", "inference_1"):
        log = tmp_path / f"{name}.log"
        log.write_text(f"the last line of {name}\n")
        recipe = Recipe(name, name.partition("_")[0], log)
        made.children[name] = Child(recipe, Ended(None), restarted_at=[time.monotonic()] * 2)
    return made


def test_a_server_that_crashes_too_often_is_given_up_while_another_is_left(supervisor):
    supervisor.children["inference_1"].program.code = -9
    assert supervisor._judge(False) is None
    assert supervisor._judge(False) is None
    assert supervisor.children["inference_1"].is_given_up
    (said,) = supervisor.said
    assert "inference_1 was killed by signal 9; it was started again 2 times within 600 s" in said
    assert "The run goes on without it" in said
    assert "the last line of inference_1" in said


def test_the_last_server_that_is_left_stops_the_run(supervisor):
    for name in ("inference_1", "inference_0"):
        assert supervisor._judge(False) is None
        supervisor.children[name].program.code = -9
    code, reason = supervisor._judge(False)
    assert code == EXIT_CRASH
    assert reason.startswith("inference_0 was killed by signal 9")


def test_a_server_that_refuses_its_settings_stops_the_run(supervisor):
    supervisor.children["inference_1"].program.code = EXIT_REFUSED
    assert supervisor._judge(False) == (EXIT_REFUSED, "inference_1 ended with exit code 2")


def test_a_crash_of_the_trainer_is_not_outlived(supervisor):
    supervisor.children["trainer"].program.code = -9
    assert supervisor._judge(False)[0] == EXIT_CRASH
