"""What torch sees on this machine, as JSON: `python -m ratchet.models.probe [MODEL_DIRECTORY]`.

A program of its own: commands that need no torch stay quick, and a torch that cannot even be imported is an answer.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def gpus() -> list[dict[str, str | int]]:
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def count_parameters(directory: Path) -> int:
    """From the shape alone: no weight is read or made."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    model = sys.argv[1:2]
    found = {
        "cuda_build": torch.version.cuda,
        "gpus": gpus(),
        "parameters": count_parameters(Path(model[0])) if model else None,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
