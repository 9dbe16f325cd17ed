"""The estimate of the disk that a run needs, by hand: 1 M parameters take 12 + 4 MB a checkpoint, and 8 MB beside."""

import torch
from safetensors.torch import save_file

from ratchet.config import CkptConfig, DataConfig, ModelConfig, SFTConfig
from ratchet.launch.preflight import count_parameters, disk_warning


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
