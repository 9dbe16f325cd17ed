"""Models in and out: built from a config and a seed, loaded as Hugging Face models, saved as such."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ratchet import hub
from ratchet.chat import FILES as CHAT_FILES
from ratchet.config import ModelConfig
from ratchet.errors import Refusal
from ratchet.models import naming
from ratchet.rng import derive

disable_progress_bar()  # the programs write to log files

WEIGHTS = "model.safetensors"
_COPIED = [*CHAT_FILES, "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"]


def build(
    model: ModelConfig, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a configuration: its weights, or random ones that are a function of the seed.

    Raises: Refusal if it cannot be loaded.
    """
    module: Any
    try:
        if model.random_init:
            module = _from_seed(model, seed).to(dtype=dtype)
        else:
            module = AutoModelForCausalLM.from_pretrained(
                model.name, dtype=dtype, attn_implementation=model.attention
            )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"The model {model.name} cannot be loaded: {reason}") from None
    return module.to(device)


def _from_seed(model: ModelConfig, seed: int) -> Any:
    """Draw on the CPU in fp32, so that every device and every rank begins with the same numbers."""
    config = AutoConfig.from_pretrained(hub.snapshot(model.name, ["config.json"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=model.attention
        )


def shape(model: ModelConfig) -> PreTrainedModel:
    """The network of a configuration without its values, which knows the names that its files have."""
    patterns = ["config.json"] if model.random_init else ["config.json", "*.safetensors"]
    directory = hub.snapshot(model.name, patterns)
    module = naming.empty(AutoConfig.from_pretrained(directory))
    if not model.random_init and (headers := _headers(directory)):
        naming.load(module, headers, "meta", module.dtype)
    return module


def _headers(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory without its values."""
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118 it is no mapping
            }
    return found


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def source_directory(model: ModelConfig) -> Path:
    """Where the config and tokenizer files of a model lie on this machine."""
    return hub.snapshot(model.name, _COPIED)


def save(directory: Path, tensors: dict[str, torch.Tensor], model: ModelConfig) -> None:
    """Write a directory that `from_pretrained` and vLLM load: weights, config, tokenizer and chat template.

    The bytes are a function of the tensors and of the source's files, so equal policies have equal digests.
    Raises: OSError
    """
    _write_tensors(directory / WEIGHTS, tensors)
    save_rest(directory, tensors, model)


def save_rest(directory: Path, tensors: dict[str, torch.Tensor], model: ModelConfig) -> None:
    """What `save` writes beside the tensors. Raises: OSError"""
    source = source_directory(model)
    dtypes = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    dtype = dtypes.most_common(1)[0][0]
    config = read_config(source)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer = source if model.tokenizer is None else hub.snapshot(model.tokenizer, CHAT_FILES)
    for name in _COPIED:
        origin = source if name == "generation_config.json" else tokenizer
        if name != "config.json" and (origin / name).exists():
            shutil.copyfile(origin / name, directory / name)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises: OSError, also for what safetensors tells as an error of its own"""
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
        )
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
