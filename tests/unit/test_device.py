"""The device of a run: chosen once, and left only when the configuration says so."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ratchet import attempts, device, hardware
from ratchet.device import Held
from ratchet.errors import EXIT_CRASH, EXIT_REFUSED, RatchetError
from ratchet.paths import RunPaths
from ratchet.stage import Stage

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Attempts of one run; a GPU has a name without being there."""
    paths = RunPaths(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(hardware, "processor", lambda: "EPYC")

    def begin(number):
        paths.attempt(number).mkdir(parents=True)
        (paths.attempt(number) / attempts.RECORD).touch()
        paths.staging.mkdir(exist_ok=True)
        return SimpleNamespace(
            paths=paths, attempt=number, stage=Stage.open(paths, f"{number:03d}.trainer.0")
        )

    return begin


def hold(assignment, wanted, chosen, role="trainer"):
    device.hold(assignment, role, wanted, chosen)


@pytest.mark.parametrize("chosen", [CPU, GPU])
def test_a_run_goes_on_where_it_began(attempt, chosen, caplog):
    first = attempt(1)
    for assignment in (first, first, attempt(2)):  # started, restarted, continued
        hold(assignment, "auto", chosen)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert first.paths.device(2, "trainer").exists()


@pytest.mark.parametrize(
    ("began", "found", "code", "says"),
    [
        (GPU, CPU, EXIT_CRASH, r"cuda \(H200\).*torch finds no GPU \(.+\).*trainer.device = \"cpu\""),
        (CPU, GPU, EXIT_REFUSED, r"cpu \(EPYC\).*trainer.device = \"cpu\" to go on as before, or \"cuda\""),
    ],
)
def test_auto_leaves_no_device_unasked(attempt, began, found, code, says, caplog):
    hold(attempt(1), "auto", began)
    second = attempt(2)
    with pytest.raises(RatchetError, match=says) as refused:
        hold(second, "auto", found)
    assert refused.value.exit_code == code
    assert not second.paths.device(2, "trainer").exists()
    hold(second, found.type, found)  # named by the user
    assert "not the same bits" in caplog.text
    hold(attempt(3), "auto", found)  # where it has been moved to


def test_another_model_of_the_same_kind_is_said(attempt, caplog, monkeypatch):
    hold(attempt(1), "auto", GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "B200")
    hold(attempt(2), "auto", GPU)
    assert "computing on cuda (B200) from here on, on cuda (H200) before" in caplog.text


def test_each_role_has_its_own(attempt):
    assignment = attempt(1)
    hold(assignment, "auto", GPU)
    hold(assignment, "auto", CPU, role="inference")
    hold(assignment, "auto", CPU, role="inference")


def test_a_rank_that_is_not_the_first_looks_and_does_not_write(attempt):
    first = attempt(1)
    device.hold(first, "trainer", "auto", GPU, writes=False)
    assert not first.paths.device(1, "trainer").exists()
    hold(first, "auto", GPU)
    with pytest.raises(RatchetError, match="would go on on cpu"):
        device.hold(first, "trainer", "auto", CPU, writes=False)


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch, caplog, tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 5\n")
    monkeypatch.setattr(hardware, "GPUS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("driver too old\nmore"))
    )
    assert hardware.gpus() == ["NVIDIA H200"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.choose("auto") == CPU
    assert "torch cannot use it (driver too old): computing on the CPU" in caplog.text
    caplog.clear()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device.choose("auto") == CPU
    assert device.choose("cpu") == CPU
    assert not caplog.records


def test_the_processor_has_a_name(monkeypatch, tmp_path):
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: AMD EPYC\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(hardware, "_PROCESSORS", listed)
    assert hardware.processor() == "AMD EPYC"
    monkeypatch.setattr(hardware, "_PROCESSORS", tmp_path / "none")
    assert hardware.processor()


def test_held_reads_well():
    assert str(Held("cuda", "H200")) == "cuda (H200)"
