"""safetensors files by mapping: the same bytes as the library's, hashed on the way, read without a copy."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ratchet import durable
from ratchet.errors import Damaged
from ratchet.models import tensor_file
from ratchet.models.tensor_file import Layout, MappedFile


def every_type():
    """Tensors of every type, of names that sort otherwise than they were made, empty ones, a scalar, a transposed."""
    found = {}
    for name, dtype in tensor_file._TYPES.items():
        for label in ("b", "a", 'é"x'):
            found[f"{label}.{name}"] = (torch.arange(21).reshape(7, 3) % 2).to(dtype)
    found |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0), "turned": torch.randn(5, 7).t()}
    return found


def write(path, tensors):
    layout = Layout(tensors)
    file = MappedFile(path, layout.size_bytes)
    return file, tensor_file.write(file, layout, tensors, path.name)


@pytest.mark.parametrize("piece_bytes", [8, 20, 1 << 20])
def test_the_bytes_are_those_of_safetensors_and_the_hash_is_theirs(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensor_file, "_PIECE_BYTES", piece_bytes)
    tensors = every_type()
    file, entry = write(tmp_path / "own", tensors)
    file.close()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry.xxh3 == durable.hash_file(tmp_path / "own")
    assert entry.size == (tmp_path / "own").stat().st_size


def test_what_is_read_is_what_was_written(tmp_path):
    tensors = every_type()
    file, entry = write(tmp_path / "x.safetensors", tensors)
    file.close()
    found, theirs = tensor_file.read(tmp_path, entry), load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors) == set(theirs)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert (
            tensor.reshape(-1).view(torch.uint8).tolist()
            == theirs[name].reshape(-1).view(torch.uint8).tolist()
        )


def test_changing_what_was_read_changes_no_file(tmp_path):
    file, entry = write(tmp_path / "x", {"a": torch.ones(4)})
    tensor_file.read(tmp_path, entry)["a"].zero_()
    assert tensor_file.read(tmp_path, entry)["a"].tolist() == [1.0] * 4
    file.close()


@pytest.mark.parametrize("place", [3, 20, -1])
def test_a_flipped_bit_is_found_before_anything_is_read(tmp_path, place):
    file, entry = write(tmp_path / "x", {"a": torch.ones(64)})
    file.close()
    data = bytearray((tmp_path / "x").read_bytes())
    data[place] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Damaged, match="expected xxh3"):
        tensor_file.read(tmp_path, entry)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 8, b"\2\0\0\0\0\0\0\0{]", b"\2\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_damaged_even_if_its_hash_is_right(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    (entry,) = durable.seal(tmp_path)
    with pytest.raises(Damaged):
        tensor_file.read(tmp_path, entry)


def test_a_file_is_alone_until_somebody_maps_it_and_again_when_the_last_view_is_gone(tmp_path):
    file, entry = write(tmp_path / "x", {"a": torch.ones(4), "b": torch.ones(2)})
    assert file.is_alone()
    found = tensor_file.read(tmp_path, entry)
    assert not file.is_alone()
    view = found.pop("b")[:1]
    del found
    assert not file.is_alone()
    del view
    assert file.is_alone()
    with (tmp_path / "x").open("rb"):
        assert not file.is_alone()
    file.close()


def test_memory_that_is_not_there_is_an_error_and_not_a_death(tmp_path):
    with pytest.raises(OSError, match="x") as error:
        MappedFile(tmp_path / "x", 1 << 50)
    assert error.value.filename == str(tmp_path / "x")
