import signal
import time

from ratchet.launch import stopping
from ratchet.launch.stopping import Stopping


def test_two_signals_at_once_are_one_request_and_a_later_one_is_urgent(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    asked = Stopping()
    assert not asked.is_asked
    for _ in range(2):
        asked.on_signal(signal.SIGTERM, None)
        now[0] += stopping.SAME_S
        assert (asked.is_asked, asked.is_urgent) == (True, False)
    now[0] += 0.01
    asked.on_signal(signal.SIGINT, None)
    assert asked.is_urgent


def test_what_another_node_told_and_a_signal_of_ones_own_are_one_request():
    asked = Stopping()
    asked.is_told = True
    assert (asked.is_asked, asked.is_urgent) == (True, False)
    asked.on_signal(signal.SIGTERM, None)
    assert (asked.is_asked, asked.is_urgent) == (True, False)
