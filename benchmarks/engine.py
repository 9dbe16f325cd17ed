"""The embedded engine beside vLLM and HF `generate` on CPU cores: `python benchmarks/engine.py --vllm-python PYTHON`.

Random weights; 256 requests with prompts of 32 tokens, 4 to 64 new tokens each, all at once, over HTTP for the two
servers and as one padded batch for HF. One side runs at a time, fp32 and the same number of threads for each; rounds
alternate. Without PYTHON (of the environment that `examples/vllm/build_env.sh` makes) vLLM is left out.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TINY = Path("examples/reverse_text/model")
SHAPES = {  # hidden, layers, heads, head_dim, intermediate, vocabulary
    "small (256 x 4)": (256, 4, 4, 64, 768, 512),
    "large (50 M)": (640, 8, 10, 64, 1920, 4096),
}
REQUESTS, PROMPT, SHORTEST, LONGEST = 256, 32, 4, 64
ROUNDS = 3


def say(what: str, figure: str) -> None:
    sys.stdout.write(f"{what:48} {figure}\n")
    sys.stdout.flush()


def write_model(root: Path, shape: tuple[int, ...]) -> Path:
    """A directory with weights, so that all sides have the same ones."""
    hidden, layers, heads, head_dim, intermediate, vocabulary = shape
    config = AutoConfig.from_pretrained(
        TINY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / name).write_bytes((TINY / name).read_bytes())
    return root


def work(vocabulary: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens to answer each with."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, REQUESTS).tolist()
    return [(draw.integers(3, min(vocabulary, 60), PROMPT).tolist(), length) for length in lengths]


@contextmanager
def server(model: Path, threads: int, *more: str) -> Iterator[str]:
    """A standing server of ours, whichever engine; yields its URL."""
    flags = ("--model.name", str(model), "--inference.port", "0", "--inference.threads", str(threads))
    flags += ("--inference.slots", "128", "--inference.max-model-len", "128", *more)
    code = "from ratchet.cli.programs import inference; inference()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise SystemExit("".join(said))
        yield found[1]
    finally:
        process.terminate()
        process.wait()


async def play(url: str, model: str, requests: list[tuple[list[int], int]]) -> float:
    """Seconds until all are answered, all sent at once."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(
        base_url=url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def one(seed: int, prompt: list[int], length: int) -> int:
            sampling = {"max_tokens": length, "temperature": 1.0, "seed": seed, "logprobs": 0}
            body = {
                "model": model,
                "token_ids": prompt,
                "sampling_params": sampling | {"ignore_eos": True},
            }
            async with session.post("/inference/v1/generate", json=body) as answer:
                data = await answer.json()
                return len(data["choices"][0]["token_ids"])

        started = time.perf_counter()
        counts = await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))
        elapsed = time.perf_counter() - started
    assert counts == [length for _, length in requests]
    return elapsed


async def wait_for(url: str) -> None:
    async with aiohttp.ClientSession(base_url=url) as session:
        while True:
            try:
                async with session.get("/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


def serve_and_measure(model: Path, threads: int, requests: list[Any], *more: str) -> float:
    with server(model, threads, *more) as url:
        asyncio.run(wait_for(url))
        asyncio.run(play(url, str(model), requests))  # once to warm up
        return statistics.median(asyncio.run(play(url, str(model), requests)) for _ in range(2))


def hf_generate(model: Path, threads: int, requests: list[tuple[list[int], int]]) -> float:
    """One batch that runs to the longest answer: what `generate` can do with lengths that differ."""
    torch.set_num_threads(threads)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = torch.tensor([prompt for prompt, _ in requests])
    mask = torch.ones_like(prompts)
    longest = max(length for _, length in requests)
    started = time.perf_counter()
    network.generate(
        prompts, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=longest, max_new_tokens=longest
    )
    return time.perf_counter() - started


def compare(name: str, root: Path, threads: int, vllm: Path | None) -> None:
    model = write_model(root, SHAPES[name])
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    requests = work(vocabulary)
    tokens = sum(length for _, length in requests)
    sides: dict[str, list[float]] = {"ours": [], "HF generate": [], **({"vLLM": []} if vllm else {})}
    for _ in range(ROUNDS):
        sides["ours"].append(serve_and_measure(model, threads, requests))
        sides["HF generate"].append(hf_generate(model, threads, requests))
        if vllm:
            own = ("--inference.engine", "vllm", "--inference.vllm.python", str(vllm))
            sides["vLLM"].append(serve_and_measure(model, threads, requests, *own))
    for side, times in sides.items():
        ratio = statistics.median(t / o for t, o in zip(times, sides["ours"], strict=True))
        rate = tokens / statistics.median(times)
        say(f"{name}: {side}", f"{rate:8,.0f} tokens/s, ours is {ratio:.2f}x of it")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    say("threads of each side", str(arguments.threads))
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as root:
            compare(name, Path(root), arguments.threads, arguments.vllm_python)


if __name__ == "__main__":
    main()
