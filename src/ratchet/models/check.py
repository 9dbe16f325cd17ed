"""Whether the model of a configuration can be loaded, said before any program starts. Needs no torch."""

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from ratchet import durable, hub
from ratchet.config import ModelConfig
from ratchet.errors import Refusal
from ratchet.paths import parse_step

_STATEFUL = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zaya",
}
"""Model types that were tried out, whose files need not say what their layers are."""
_STATES = {"conv", "linear_attention", "mamba", "recurrent"}


def check_files(model: ModelConfig) -> None:
    """Raises: Refusal with the remedy if there is no model, or none of its weights."""
    if not Path(model.name).is_dir() and hub.is_local(model.name):
        raise Refusal(f"The model directory {model.name} does not exist{_remedy(Path(model.name))}.")
    directory = hub.snapshot(model.name, ["config.json"])
    if not (directory / "config.json").exists():
        raise Refusal(f"{directory} has no config.json, so it is not a model directory.")
    if model.random_init:
        return
    if not Path(model.name).is_dir():
        # Downloaded before any program waits for it.
        directory = hub.snapshot(model.name, ["*.safetensors", "*.json", "*.jinja", "*.txt"])
    if not any(directory.glob("*.safetensors")):
        raise Refusal(
            f"{directory} holds no *.safetensors: give a trained model, or set model.random_init = true."
        )


def check_model(model: ModelConfig, *, may_be_quantised: bool = False) -> None:
    """Refuse a model that is there and that no program here could use.

    Raises: Refusal with the remedy, also if the weights are quantised where only vLLM could use them.
    """
    directory = hub.snapshot(model.name, ["config.json"])
    if not may_be_quantised and read_config(directory).get("quantization_config"):
        raise Refusal(
            f"{model.name} holds quantised weights, which can be served by vLLM but not trained: give the model "
            "that they were made from."
        )
    if model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Refusal("model.attention is flash_attention_2, but the package flash-attn is not installed.")
    if model.lora is not None and importlib.util.find_spec("peft") is None:
        raise Refusal("model.lora needs the package peft: install `ratchet[lora]`.")


def check_served(model: ModelConfig) -> None:
    """Raises: Refusal for a model of which it is certain that the embedded engine, once it has it, will refuse it."""
    directory = hub.snapshot(model.name, ["config.json"])
    config = read_config(directory)
    config = config.get("text_config") or config
    layers = set(config.get("layer_types") or [])
    if config.get("model_type") in _STATEFUL or layers & _STATES:
        raise Refusal(unserved(model.name, "it has layers that carry a state from token to token"))
    if config.get("kv_lora_rank"):
        raise Refusal(unserved(model.name, "its attention is latent"))


def unserved(name: str, reason: str) -> str:
    return f'The embedded engine cannot serve {name} ({reason}): set inference.engine = "vllm".'


def read_config(directory: Path) -> dict[str, Any]:
    """What a model directory states of its model. Raises: Refusal"""
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} cannot be read ({error}): check model.name.") from None
    if not isinstance(found, dict):
        raise Refusal(f"{path} is not an object, so {directory} is not a model directory.")
    return found


def _remedy(directory: Path) -> str:
    """For `<run>/weights/step_N`: which command makes it, found among the files next to those on the command line."""
    if parse_step(directory.name) is None or directory.parent.name != "weights":
        return ": check model.name"
    run = directory.parent.parent
    there = durable.steps(directory.parent)
    if there:
        return f"; {run} has published {', '.join(str(step) for step in there)}"
    command = next((f"`uv run sft @ {path}`" for path in _neighbours() if _output_of(path) == run), None)
    return f": make it with {command or f'the run whose output_dir is {run}'}"


def _neighbours() -> list[Path]:
    """The configuration files beside those that this command names."""
    named = [Path(token.lstrip("@")) for token in sys.argv[1:] if token.endswith(".toml")]
    return sorted({path for file in named for path in file.parent.glob("sft*.toml")})


def _output_of(path: Path) -> Path | None:
    try:
        output = tomllib.loads(path.read_text()).get("output_dir")
    except (OSError, tomllib.TOMLDecodeError):
        return None
    return Path(output) if output else None
