"""The doctor's verdicts: on a sound file system, on one that breaks each promise in turn, on numbers worked by hand."""

import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from packaging.requirements import Requirement

from programs import run
from ratchet.config import CkptConfig, ModelConfig, RLConfig, RLTrainerConfig
from ratchet.launch import machine, trials
from ratchet.launch.machine import Gpu, Torch
from ratchet.memory import Memory


def verdicts(findings):
    return {finding.name: finding.verdict for finding in findings}


def broken(directory):
    """The names and sentences of what fails."""
    return {f.name: f.text for f in trials.examine(directory) if f.verdict == "fails"}


def config(**changes):
    model = ModelConfig(name="m", random_init=True)
    return RLConfig(model=model, max_steps=10, **changes)


def test_a_sound_file_system_passes_every_trial_and_is_left_as_it_was(tmp_path):
    found = verdicts(trials.examine(tmp_path))
    assert {found[name] for name in ("promises", "fence", "append")} == {"ok"}
    assert "fails" not in found.values()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_judged_by_its_parent_and_not_made(tmp_path):
    assert broken(tmp_path / "a" / "b") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_said_and_nothing_else_is_tried():
    found = trials.examine(Path("/proc/no/such"))
    assert [f.name for f in found] == ["directory", "directory"]
    assert "/proc cannot be written" in found[1].text
    assert found[1].remedy


def test_a_rename_that_copies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "rename", lambda a, b: (shutil.copytree if Path(a).is_dir() else shutil.copy)(a, b)
    )
    assert "a dead process could publish" in broken(tmp_path)["fence"]


def test_what_every_launcher_requires_is_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, mode: None)
    said = broken(tmp_path)["promises"]
    assert said.startswith(f"A lock in {tmp_path} does not keep another process out")


def test_appending_that_overwrites_is_noticed(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(os, "open", lambda p, flags, *more: real(p, flags & ~os.O_APPEND, *more))
    assert "could overwrite each other" in broken(tmp_path)["append"]


def test_a_directory_that_cannot_be_synced_is_noticed(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    assert "Invalid argument" in broken(tmp_path)["fsync"]


MOUNTS = """\
/dev/sda / ext4 rw 0 0
tmpfs /run tmpfs rw 0 0
server:/data /data nfs4 rw 0 0
/dev/sdb /data/my\\040disk xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/mnt/x", "ext4"),
        ("/run", "tmpfs"),
        ("/running", "ext4"),
        ("/data/x", "nfs4"),
        ("/data/my disk/x", "xfs"),
    ],
)
def test_the_longest_mount_point_above_a_directory_decides_its_type(place, kind):
    assert trials.mount_type(Path(place), MOUNTS) == kind


def test_this_interpreter_and_its_packages_fit():
    assert machine.python().verdict == "ok"
    found = machine.packages()
    assert found.verdict == "ok", found.text
    assert "torch" in found.text


def test_programs_that_compile_torch_at_every_start_are_warned_of(monkeypatch, tmp_path):
    torch = SimpleNamespace(cached=str(tmp_path / "torch.pyc"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: torch)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = machine.byte_code()
    assert found is not None
    assert found.verdict == "warning"
    assert "--compile-bytecode" in found.remedy
    Path(torch.cached).touch()
    assert machine.byte_code() is None, "what is compiled already need not be written"
    Path(torch.cached).unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert machine.byte_code() is None, "the first start writes it"


def test_another_platform_is_said(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.python().verdict == "fails"


def test_a_package_outside_its_range_and_one_that_is_missing_are_said(monkeypatch):
    lines = ["rich>=99", "no-such-package>=1", 'wandb>=0.20 ; extra == "wandb"', "packaging>=1"]
    monkeypatch.setattr(machine.metadata, "requires", lambda name: lines)
    found = machine.packages()
    assert found.verdict == "fails"
    assert "supported is >=99" in found.text
    assert "no-such-package is not installed" in found.text
    assert "wandb" not in found.text
    assert machine._misfit(Requirement("packaging>=1")) is None


def test_more_processes_than_gpus_and_a_gpu_that_is_not_there_fail():
    two = Torch("13.0", [Gpu("H", 80_000_000_000)] * 2, None)
    none = Torch("13.0", [], None)
    three = config(trainer=RLTrainerConfig(nproc=3))
    assert machine.devices(two, config()).text == "H (80.0 GB), H (80.0 GB)"
    assert "nproc is 3, and torch sees 2 GPUs" in machine.devices(two, three).text
    assert machine.devices(none, three).verdict == "ok"
    found = machine.devices(none, config(trainer=RLTrainerConfig(device="cuda")))
    assert found.verdict == "fails"
    assert "its CUDA 13.0 finds none" in found.text
    assert machine.devices("No module named 'torch'", None).verdict == "fails"


def test_disk_and_memory_by_hand(tmp_path, monkeypatch):
    """1 M parameters: a checkpoint 12 MB, its policy 4 MB, 8 MB beside; the trainer's state 16 MB."""
    found = Torch(None, [], 1_000_000)
    run_config = config(ckpt=CkptConfig(interval=5))
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 40_000_000))
    said = machine.disk(found, run_config, tmp_path)
    assert said.verdict == "ok"
    assert said.text.startswith("2 checkpoints and the weights need about 40.0 MB; 40.0 MB are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 39_999_999))
    assert machine.disk(found, run_config, tmp_path).verdict == "fails"
    monkeypatch.setattr(machine, "available_bytes", lambda: 16_000_000)
    assert machine.memory(found, run_config).verdict == "ok"
    monkeypatch.setattr(machine, "available_bytes", lambda: 15_999_999)
    assert machine.memory(found, run_config).verdict == "warning"


def test_the_command_says_what_the_start_would_refuse_and_touches_nothing(tmp_path):
    settings = ("--model.name", tmp_path / "gone", "--output-dir", tmp_path / "run")
    said = run("ratchet", "doctor", "--json", "rl", "@", "examples/reverse_text/rl.toml", *settings, code=1)
    answer = msgspec.json.decode(said)
    assert not answer["works"]
    assert [f["name"] for f in answer["findings"] if f["verdict"] == "fails"] == ["settings"]
    assert "gone does not exist" in answer["findings"][-1]["text"]
    assert list(tmp_path.iterdir()) == []


def test_policies_in_memory_of_a_run_whose_launcher_was_killed_are_named(tmp_path):
    settings = config(weights={"transport": "memory", "memory_dir": str(tmp_path)})
    assert machine.leftovers(settings) is None
    held = Memory.open(settings, "x", 1)
    assert machine.leftovers(settings) is None
    held._owner.close()
    found = machine.leftovers(settings)
    assert found.verdict == "warning"
    assert found.remedy == f"rm -r {tmp_path / f'ratchet-{os.getuid()}-x'}"
