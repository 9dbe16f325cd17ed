"""Which GPUs each of several servers sees."""

import pytest

from ratchet import hardware
from ratchet.config import InferenceConfig
from ratchet.launch import devices


def seen(monkeypatch, visible=None, **settings):
    """CUDA_VISIBLE_DEVICES of the first four replicas."""
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(devices.VISIBLE, visible)
    config = InferenceConfig(**settings)
    return [devices.environment(config, replica).get(devices.VISIBLE) for replica in range(4)]


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(hardware, "GPUS", tmp_path)


def test_replicas_take_the_gpus_of_the_machine_in_turn(monkeypatch, three_gpus):
    assert seen(monkeypatch, replicas=4) == ["0", "1", "2", "0"]


def test_replicas_take_those_that_the_launcher_may_see(monkeypatch, three_gpus):
    assert seen(monkeypatch, "2, 5", replicas=4) == ["2", "5", "2", "5"]


def test_what_the_configuration_says_counts(monkeypatch, three_gpus):
    assert seen(monkeypatch, "7", replicas=2, devices=["0,1", "2,3"]) == ["0,1", "2,3", "0,1", "2,3"]
    assert seen(monkeypatch, devices=["4"])[0] == "4"


def test_a_single_server_and_one_on_a_cpu_see_what_the_launcher_sees(monkeypatch, three_gpus, tmp_path):
    assert seen(monkeypatch)[0] is None
    assert seen(monkeypatch, replicas=2, device="cpu")[:2] == [None, None]
    assert seen(monkeypatch, "", replicas=2)[:2] == [None, None]
    monkeypatch.setattr(hardware, "GPUS", tmp_path / "none")
    assert seen(monkeypatch, replicas=2)[:2] == [None, None]
