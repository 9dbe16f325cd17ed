"""The device of a run: chosen once, and left only when the configuration says so."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ratchet import attempts, device_notes, hardware
from ratchet.errors import EXIT_CRASH, RatchetError
from ratchet.models import device
from ratchet.paths import RunPaths
from ratchet.stage import Stage

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Whether torch finds a GPU; it has a name without being there."""
    found = SimpleNamespace(there=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(hardware, "processor", lambda: "EPYC")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


@pytest.fixture
def attempt(tmp_path):
    """Attempts of one run, which continue at a step."""
    paths = RunPaths(tmp_path)

    def begin(number, step=2):
        directory = paths.attempt(number)
        directory.mkdir(parents=True)
        (directory / attempts.RECORD).touch()
        paths.staging.mkdir(exist_ok=True)
        plan = SimpleNamespace(step=step, next_batch=step, from_checkpoint=step > 0)
        stage = Stage.open(paths, f"{number:03d}.trainer.0")
        return SimpleNamespace(paths=paths, attempt=number, plan=plan, stage=stage)

    return begin


def start(assignment, wanted="auto", name="trainer"):
    chosen = device.choose_for(assignment, name, wanted)
    device.note(assignment, name, chosen)
    return chosen


@pytest.mark.parametrize(("is_there", "chosen"), [(False, CPU), (True, GPU)])
def test_a_run_goes_on_where_it_began(attempt, gpus, is_there, chosen, caplog):
    gpus.there = is_there
    first = attempt(1, step=0)
    assert [start(one) for one in (first, first, attempt(2))] == [chosen] * 3  # restarted, continued
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_gpu_that_is_gone_ends_the_program_like_a_crash(attempt, gpus, caplog):
    gpus.there = True
    first = attempt(1, step=0)
    start(first)
    gpus.there = False
    second = attempt(2)
    for assignment in (first, second):
        with pytest.raises(
            RatchetError, match=r"on cuda \(H200\), and torch finds no GPU \(.+\).*--trainer.device cpu"
        ) as end:
            start(assignment)
        assert end.value.exit_code == EXIT_CRASH
    assert not second.paths.device(2, "trainer").exists()
    assert start(second, "cpu") == CPU
    assert "computing on cpu (EPYC) from here on, on cuda (H200) before" in caplog.text
    gpus.there = True
    assert start(attempt(3)) == CPU  # where it has been moved to


def test_a_gpu_that_has_come_is_left_alone(attempt, gpus):
    start(attempt(1, step=0))
    gpus.there = True
    assert start(attempt(2)) == CPU
    assert start(attempt(3), "cuda") == GPU


@pytest.mark.parametrize(("began", "continued"), [(CPU, GPU), (GPU, CPU)])
def test_an_attempt_of_which_nothing_is_left_binds_no_other(attempt, gpus, began, continued):
    gpus.there = began == GPU
    assert start(attempt(1, step=0)) == began
    gpus.there = continued == GPU
    assert start(attempt(2, step=0)) == continued


def test_servers_go_on_where_one_of_them_did(attempt, gpus):
    gpus.there = True
    assignment = attempt(1, step=0)
    start(assignment, name="inference")
    gpus.there = False
    assert start(assignment) == CPU  # the trainer is another role
    with pytest.raises(RatchetError, match="inference of this run has computed on cuda"):
        start(attempt(2), name="inference_1")


@pytest.mark.parametrize("damaged", [b"", b"[]", b"\xff", b'{"type": "\xff"}'])
def test_a_note_that_cannot_be_read_does_not_count(attempt, gpus, damaged, caplog):
    gpus.there = True
    first = attempt(1, step=0)
    start(first)
    first.paths.device(1, "trainer").write_bytes(damaged)
    gpus.there = False
    assert start(attempt(2)) == CPU
    assert "cannot be read" in caplog.text


def test_notes_are_copied_with_an_attempt(attempt, gpus, tmp_path):
    assignment = attempt(1, step=0)
    start(assignment)
    start(assignment, name="inference")
    target = RunPaths(tmp_path / "copy")
    target.attempt(4).mkdir(parents=True)
    (target.attempt(4) / attempts.RECORD).touch()
    device_notes.copy(assignment.paths.attempt(1), target.attempt(4))
    for role in ("trainer", "inference"):
        assert str(device_notes.newest(target, role, since=0)) == "cpu (EPYC)"


def test_each_rank_has_a_gpu_of_its_own(gpus, monkeypatch):
    gpus.there = True
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.choose("auto") == torch.device("cuda", 3)


def test_a_gpu_that_torch_cannot_use_is_said(gpus, monkeypatch, caplog, tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 5\n")
    monkeypatch.setattr(hardware, "GPUS", tmp_path)
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
