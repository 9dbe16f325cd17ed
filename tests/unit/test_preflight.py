"""The estimate of the disk that a run needs, by hand: 1 M parameters take 12 + 4 MB a checkpoint, and 8 MB beside."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from ratchet.config import CkptConfig, DataConfig, ModelConfig, RLConfig, SFTConfig
from ratchet.errors import Refusal
from ratchet.launch import preflight
from ratchet.launch.preflight import check_memory, count_parameters, disk_warning


def config(tmp_path, **ckpt):
    save_file({"a": torch.zeros(1000, 600), "b": torch.zeros(400_000)}, tmp_path / "model.safetensors")
    return SFTConfig(
        model=ModelConfig(name=str(tmp_path)),
        max_steps=10,
        data=DataConfig(name="x"),
        output_dir=tmp_path,
        ckpt=CkptConfig(**ckpt),
    )


def test_parameters_are_counted_from_the_headers(tmp_path):
    config(tmp_path)
    assert count_parameters(tmp_path) == 1_000_000
    assert count_parameters(tmp_path / "none") is None


def test_one_checkpoint_fits_exactly_and_not_in_a_byte_less(tmp_path):
    run = config(tmp_path)
    assert disk_warning(run, free_bytes=24_000_000) is None
    assert "1 checkpoints of 1 M parameters need about 0.0 GB" in disk_warning(run, free_bytes=23_999_999)


def test_keep_last_bounds_the_need_with_one_in_transit(tmp_path):
    run = config(tmp_path, interval=1, keep_last=2)
    assert disk_warning(run, free_bytes=56_000_000) is None
    assert disk_warning(run, free_bytes=55_000_000) is not None
    assert disk_warning(config(tmp_path, interval=1), free_bytes=160_000_000) is not None


def by_memory(tmp_path, **weights):
    save_file({"a": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    return RLConfig(
        model=ModelConfig(name=str(tmp_path)),
        max_steps=10,
        max_async_level=2,
        weights={"transport": "memory", "memory_dir": "/dev/shm", **weights},
    )


def test_five_policies_fit_into_the_memory_and_not_in_a_byte_less(tmp_path, monkeypatch):
    """Async level 2: three that sample or are read, one that is written, one whose pages wait: 5 x 4 MB."""
    usage, run = shutil._ntuple_diskusage, by_memory(tmp_path)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 20_000_000))
    check_memory(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 19_999_999))
    with pytest.raises(Refusal, match=r"5 policies in memory need about 0\.0 GB.* or set weights\.transport"):
        check_memory(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1 << 40))
    monkeypatch.setattr(preflight, "available_bytes", lambda: 19_999_999)
    with pytest.raises(Refusal, match="5 policies"):
        check_memory(run)


def test_memory_is_a_tmpfs_and_can_be_written(tmp_path):
    with pytest.raises(Refusal, match="not on a tmpfs"):
        check_memory(by_memory(tmp_path, memory_dir="/"))
    with pytest.raises(Refusal, match="no directory that can be written"):
        check_memory(by_memory(tmp_path, memory_dir=str(tmp_path / "none")))
    check_memory(by_memory(tmp_path, transport="filesystem", memory_dir=str(tmp_path / "none")))
