"""LoRA: small matrices beside linear layers, made and run by the peft library; everything else is frozen.

A checkpoint holds the adapters alone. The base model is not copied: it is known by the digest of its tensors, which
is compared whenever a checkpoint is used. What is published for inference is the merged model, under the names of
the base, so that every server serves it.

    trained     x.base_layer.weight (frozen)   x.lora_A.default.weight   x.lora_B.default.weight
    published   x.weight = base_layer + alpha / rank * lora_B @ lora_A
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ratchet import durable
from ratchet.config import LoraConfig
from ratchet.errors import Refusal
from ratchet.rng import derive

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."
DROPOUT = ".lora_dropout."
_WEIGHTS = "adapter_model.safetensors"


def attach(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Put an adapter beside each target, in place; the up-projections are zero, so the policy is that of the base.

    Drawn on the CPU, so that every device and every rank begins with the same numbers. Raises: Refusal
    """
    from peft import inject_adapter_in_model

    _check_targets(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "lora"))
        inject_adapter_in_model(_peft_config(lora), model)


def _peft_config(lora: LoraConfig, **more: Any) -> Any:
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
        **more,
    )


def _check_targets(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raises: Refusal where a name fits no linear layer, or one whose weight is shared."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    own = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    shared = {
        name
        for name, module in model.named_modules()
        if module is head and any(id(parameter) in own for parameter in module.parameters())
    }
    for target in lora.target_modules:
        found = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not found:
            there = sorted({name.rpartition(".")[2] for name in linear - shared})
            raise Refusal(
                f"model.lora.target_modules names {target}, but this model has no linear layer of that name; "
                f"it has {', '.join(there)}."
            )
        if found & shared:
            raise Refusal(
                f"model.lora.target_modules names {target}, whose weight is also the embedding's: an adapter "
                "beside it could not be merged; leave it out."
            )


def digest(model: PreTrainedModel) -> str:
    """One digest of every parameter and saved buffer: names, types, shapes and bytes."""
    parts = [
        (name, str(tensor.dtype), list(tensor.shape), durable.hash_bytes(_bytes_of(tensor)))
        for name, tensor in sorted(model.state_dict().items())
    ]
    return durable.hash_bytes(msgspec.json.encode(parts))


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_base(directory: Path, live: str) -> None:
    """Raises: Refusal if a checkpoint's adapters were trained beside other weights than those of digest `live`."""
    trained = durable.read_manifest(directory).meta.get("base")
    if trained != live:
        raise Refusal(
            f"{directory} holds adapters of a base model with digest {trained}; model.name gives {live}: "
            "restore the files of the base model."
        )


def merged(tensors: dict[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Whole tensors of a model with adapters, under the names of the base and with the adapters added."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if _DOWN in name or _UP in name:
            continue
        if name.endswith(f"{_BASE}weight"):
            stem = name.removesuffix(f"{_BASE}weight")
            up, down = tensors[f"{stem}{_UP}weight"], tensors[f"{stem}{_DOWN}weight"]
            tensor = tensor + (up @ down) * (lora.alpha / lora.rank)
        found[name.replace(_BASE, ".")] = tensor
    return found


def save(directory: Path, tensors: dict[str, torch.Tensor], lora: LoraConfig, base_name: str) -> None:
    """Write adapters as peft loads them: adapter_model.safetensors and adapter_config.json."""
    named = {f"base_model.model.{n.replace('.default.', '.')}": t.contiguous() for n, t in tensors.items()}
    save_file(named, directory / _WEIGHTS, metadata={"format": "pt"})
    _peft_config(lora, base_model_name_or_path=base_name, inference_mode=True).save_pretrained(directory)
