"""What it costs to verify the weights that a run begins with, beside their loading: `python benchmarks/inputs.py`.

A model with the shape of Qwen3-0.6B and random weights in bf16 (1.2 GB) is loaded as the trainer does, with its
weights verified and without, in turn; the file is in the page cache. One ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ratchet.config import ModelConfig
from ratchet.inputs import files
from ratchet.inputs.tree import Inputs, inputs
from ratchet.models.build import build

SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
}


def load_s(model: ModelConfig, known: Inputs | None) -> float:
    """Seconds for one load; verified where `known` is given."""
    started = time.perf_counter()
    with nullcontext() if known is None else files.verified_weights(model, known):
        build(model, seed=0)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="What verifying the weights of a model costs.")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        config = AutoConfig.for_model("qwen3", **SHAPE, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(name)
        size_bytes = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
        model = ModelConfig(name=name)
        known = inputs(files.weights_of(model))
        load_s(model, None)
        started = time.perf_counter()
        files.weights_of(model)
        alone = time.perf_counter() - started
        pairs = [(load_s(model, None), load_s(model, known)) for _ in range(arguments.repeats)]
    bare, verified = (statistics.median(times) for times in zip(*pairs, strict=True))
    sys.stdout.write(
        f"{size_bytes / 1e9:.2f} GB: loaded in {bare:.2f} s, verified {verified:.2f} s, ratio {verified / bare:.2f}; "
        f"hashed alone, as a first start does while torch is imported, {alone:.2f} s\n"
    )


if __name__ == "__main__":
    main()
