"""Which deaths are answered by a restart, when, and what counts as frozen."""

import pytest

from ratchet.config import LaunchConfig
from ratchet.launch.restarts import STARTUP_S, Pulse, judge

CONFIG = LaunchConfig(max_restarts=3, restart_window_s=100, backoff_s=1, frozen_s=10)


@pytest.mark.parametrize("code", [0, 2, 65, 74, 75, 76])
def test_what_would_end_the_same_way_is_not_started_again(code):
    assert judge(CONFIG, code, [], 0.0).delay_s is None
    assert judge(CONFIG, code, [], 0.0).why == ""


@pytest.mark.parametrize("code", [1, 3, 134, -9, -11])
def test_a_crash_is_started_again(code):
    assert judge(CONFIG, code, [], 0.0).delay_s == 1.0


def test_the_pause_doubles_with_each_recent_restart():
    assert judge(CONFIG, -9, [0.0], 50.0).delay_s == 2.0
    assert judge(CONFIG, -9, [0.0, 10.0], 50.0).delay_s == 4.0
    assert judge(LaunchConfig(backoff_s=40), 1, [0.0, 10.0], 50.0).delay_s == 60.0


def test_too_many_restarts_within_the_window_are_the_end_and_old_ones_are_forgotten():
    verdict = judge(CONFIG, -9, [0.0, 10.0, 20.0], 99.0)
    assert verdict.delay_s is None
    assert "3 times within 100 s" in verdict.why
    assert judge(CONFIG, -9, [0.0, 10.0, 20.0], 100.0).delay_s == 4.0  # the one at 0 is out
    assert judge(CONFIG, -9, [0.0, 10.0, 20.0], 120.0).delay_s == 1.0


def test_without_restarts_the_first_failure_is_the_end():
    verdict = judge(LaunchConfig(max_restarts=0), -9, [], 0.0)
    assert (verdict.delay_s, verdict.why) == (None, "")


def looks(pulse, beats):
    """One look a second, from second 1 on."""
    return [pulse.is_frozen(beat, float(second)) for second, beat in enumerate(beats, start=1)]


def test_no_beat_for_longer_than_frozen_s_is_frozen():
    # The last change of the stamp is seen at second 3; 13 - 3 = 10 is not more than frozen_s yet.
    found = looks(Pulse(10, 0.0), [1, 2, 3] + [3] * 11)
    assert found == [False] * 13 + [True]


def test_a_beat_every_nine_seconds_is_slow_and_not_frozen():
    assert not any(looks(Pulse(10, 0.0), [second // 9 for second in range(100)]))


def test_a_wall_clock_that_jumps_back_is_a_sign_of_life_as_any_other():
    assert not any(looks(Pulse(10, 0.0), [1000, 1001, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]))


def test_the_start_has_its_own_patience():
    pulse = Pulse(10, 0.0)
    found = looks(pulse, [None] * (int(STARTUP_S) + 1))
    assert found == [False] * int(STARTUP_S) + [True]


def test_an_observer_that_was_stopped_itself_waits_afresh():
    pulse = Pulse(10, 0.0)
    assert not pulse.is_frozen(1, 1.0)
    assert not pulse.is_frozen(1, 500.0)  # both were stopped; the program may wake up later than the launcher
    assert [pulse.is_frozen(1, 500.0 + s) for s in range(1, 12)] == [False] * 10 + [True]
