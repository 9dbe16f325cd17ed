"""The tensors of a model, gathered; those of a checkpoint without a trainer: read by name, compared, exported."""

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import PreTrainedModel

from ratchet import checkpoint
from ratchet.config import LoraConfig, ModelConfig
from ratchet.models import adapters, build, naming
from ratchet.models.trainable import build_trainable, saved_buffers

_MODEL = "model."
_GROUP_BYTES = 1 << 30


class TensorDifference(msgspec.Struct, frozen=True):
    """One tensor that is not the same. `max_abs` is None where the two cannot be compared element by element."""

    name: str
    what: str
    max_abs: float | None = None
    elements: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def schema(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Name, dtype and global shape of every tensor of a checkpoint. DCP's index is a pickle: verify it before."""
    found = FileSystemReader(directory / checkpoint.TRAINER).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read(directory: Path, wanted: dict[str, TensorStorageMetadata]) -> dict[str, torch.Tensor]:
    """Some tensors of a checkpoint, whole and on the CPU, whatever number of ranks wrote it."""
    tensors = {n: torch.empty(tuple(e.size), dtype=e.properties.dtype) for n, e in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=FileSystemReader(directory / checkpoint.TRAINER), no_dist=True)
    return tensors


def full_tensors(
    model: PreTrainedModel, *, is_kept: bool = True, into: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A copy of every parameter and saved buffer, whole and on the CPU; tied ones appear once.

    All ranks call it, because shards are gathered; those that do not keep the result copy nothing to the host.
    Tensors that are `into` already are filled again, new ones are added there: host memory costs more to get than
    to fill. Those for a GPU are pinned.
    """
    own = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    whole: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        if is_kept:
            whole[name] = _to_host(name, tensor.detach(), {} if into is None else into)
    return whole


def _to_host(name: str, tensor: torch.Tensor, known: dict[str, torch.Tensor]) -> torch.Tensor:
    if name not in known:
        known[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return known[name].copy_(tensor)


def export(directory: Path, target: Path, model: ModelConfig, *, seed: int, dtype: str) -> int:
    """Write the model of a checkpoint as a Hugging Face directory; returns the number of tensors.

    What is published has the same names, and in fp32 the same bytes. A checkpoint of an older version holds no
    buffers: they are those that the model of this configuration has.
    """
    module, tensors = build.shape(model), _model_of(directory)
    buffers = saved_buffers(module)
    if buffers.keys() - tensors.keys():
        tensors = saved_buffers(build.build(model, seed=seed)) | tensors
    written = naming.outward(module, _cast(tensors, dtype, but=buffers))
    build.save(target, written, model)
    return len(written)


def export_adapter(directory: Path, target: Path, model: ModelConfig, lora: LoraConfig, *, dtype: str) -> int:
    """Write the adapters of a checkpoint as peft loads them; returns the number of tensors."""
    tensors = _cast(_model_of(directory), dtype)
    adapters.save(target, tensors, lora, model.name)
    return len(tensors)


def export_merged(
    directory: Path, target: Path, model: ModelConfig, lora: LoraConfig, *, seed: int, dtype: str
) -> int:
    """Write the base model with a checkpoint's adapters added, as a Hugging Face directory.

    Raises: Refusal if the base is not the one that the adapters were trained beside.
    """
    module, base = build_trainable(model, seed=seed)
    assert base is not None
    adapters.check_base(directory, base)
    merged = adapters.merged(full_tensors(module) | _model_of(directory), lora)
    written = naming.outward(module, _cast(merged, dtype, but=saved_buffers(module)))
    build.save(target, written, model)
    return len(written)


def _model_of(directory: Path) -> dict[str, torch.Tensor]:
    wanted = {name: entry for name, entry in schema(directory).items() if name.startswith(_MODEL)}
    return {name.removeprefix(_MODEL): tensor for name, tensor in read(directory, wanted).items()}


def _cast(tensors: dict[str, torch.Tensor], dtype: str, but: Collection[str] = ()) -> dict[str, torch.Tensor]:
    kind: torch.dtype = getattr(torch, dtype)
    return {name: tensor if name in but else tensor.to(kind) for name, tensor in tensors.items()}


def differences(a: Path, b: Path) -> list[TensorDifference]:
    """The tensors that are not the same bit for bit, those that differ most first."""
    first, second = schema(a), schema(b)
    found = []
    for name in sorted({*first, *second}):
        here, there = first.get(name), second.get(name)
        if here is None or there is None:
            found.append(TensorDifference(name, f"only in {a if there is None else b}"))
        elif (here.size, here.properties.dtype) != (there.size, there.properties.dtype):
            found.append(TensorDifference(name, f"{_kind(here)} | {_kind(there)}"))
    shared = {n: e for n, e in first.items() if n in second and n not in {f.name for f in found}}
    for group in _groups(shared):
        left, right = read(a, group), read(b, group)
        for name in group:
            if (difference := _difference(name, left[name], right[name])) is not None:
                found.append(difference)
    return sorted(found, key=lambda d: (-(d.max_abs if d.max_abs is not None else float("inf")), d.name))


def _kind(entry: TensorStorageMetadata) -> str:
    return f"{str(entry.properties.dtype).removeprefix('torch.')} {list(entry.size)}"


def _groups(wanted: dict[str, TensorStorageMetadata]) -> Iterator[dict[str, TensorStorageMetadata]]:
    """Parts of about a gigabyte, so that two checkpoints never have to fit into memory."""
    group: dict[str, TensorStorageMetadata] = {}
    size_bytes = 0
    for name, entry in wanted.items():
        group[name] = entry
        size_bytes += entry.size.numel() * entry.properties.dtype.itemsize
        if size_bytes >= _GROUP_BYTES:
            yield group
            group, size_bytes = {}, 0
    if group:
        yield group


def _difference(name: str, a: torch.Tensor, b: torch.Tensor) -> TensorDifference | None:
    if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
        return None
    gap = (a.double() - b.double()).abs()
    elements = int((a != b).sum())
    max_abs = float(gap.max())
    return TensorDifference(name, f"max |a - b| {max_abs:.3e}, {elements} of {a.numel()}", max_abs, elements)
