"""The embedded engine beside vLLM, HF `generate` and HF continuous batching on a CPU, alternately, in one run.

    uv run python benchmarks/engine.py small --vllm-python PYTHON     hidden 256 x 4 layers, 3.2 M parameters
    uv run python benchmarks/engine.py large --vllm-python PYTHON     hidden 768 x 7 layers, 50 M parameters

PYTHON is the interpreter that `examples/vllm/build_env.sh DIR` prints; without it that side is left out. The work: 256
rollouts, sixteen of each prompt, of exactly 4 to 64 tokens each (`spread`) or all of the same length (`equal`), fp32,
random weights. Ours and vLLM are standing servers, asked by the same client over HTTP, a logprob for each token; HF's
two ways run in a process of their own, without. Each side is pinned to the same cores and has as many threads; the
client runs on the others where there are any. `products` is the limit: the weights' matrix products alone.

Tokens a second are of wall time and of CPU time of the side's own processes, which other work on the machine moves
less. A ratio is the median over the rounds.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ratchet.chat import Chat

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "reverse_text"
SHAPES = {  # hidden size, layers, heads, size of the MLP
    "small": (256, 4, 4, 768),
    "large": (768, 7, 12, 2048),
}
ROLLOUTS, GROUP, SHORTEST, LONGEST, EQUAL = 256, 16, 4, 64, 34
WAYS = ("generate", "continuous", "products")
MAX_MODEL_LEN = 128
START_S = 300.0
GOALS = {
    ("small", "vLLM"): 1.2,
    ("large", "vLLM"): 0.9,
    ("small", "generate"): 2.0,
    ("large", "generate"): 2.0,
}


class Work(NamedTuple):
    """What is to be sampled: the prompt and the exact length of each rollout."""

    prompts: list[list[int]]
    lengths: list[int]


class Speed(NamedTuple):
    """Tokens a second, by the clock and by the CPU time of the side."""

    wall: float
    cpu: float


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def make_model(kind: str, root: Path) -> Path:
    """Random weights of the shape, with the tokenizer of the example."""
    hidden, layers, heads, mlp = SHAPES[kind]
    source = root / "model"
    shutil.copytree(EXAMPLE / "model", source)
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "head_dim": hidden // heads,
    }
    shape |= {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "layer_types": ["full_attention"] * layers,
    }
    config = json.loads((source / "config.json").read_text()) | shape
    (source / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    model.save_pretrained(source)
    say(
        f"{kind}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, torch {torch.__version__}"
    )
    return source


def make_work(chat: Chat, spread: str) -> Work:
    """The rollouts of sixteen tasks of the example, group by group."""
    chance = np.random.default_rng(0)
    texts = [json.loads(line)["text"] for line in (EXAMPLE / "train.jsonl").open()][: ROLLOUTS // GROUP]
    prompts = [chat.render([{"role": "user", "content": text}]) for text in texts for _ in range(GROUP)]
    lengths = chance.integers(SHORTEST, LONGEST + 1, ROLLOUTS).tolist()
    return Work(prompts, lengths if spread == "spread" else [EQUAL] * ROLLOUTS)


# -- processes ----------------------------------------------------------------------------------------------


def cpu_s(session: int) -> float:
    """User and system time of the processes of a session so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def end_in_order() -> None:
    """A benchmark that is asked to end stops what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def started(
    words: list[object], cores: list[int], log: Path, **pipes: int
) -> Iterator[subprocess.Popen[str]]:
    """A program on some cores, stopped at the end."""
    pinned = ["taskset", "-c", ",".join(map(str, cores)), *map(str, words)]
    with log.open("w") as output:
        process = subprocess.Popen(
            pinned,
            stdin=pipes.get("stdin"),
            stdout=pipes.get("stdout", output),
            stderr=output,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- ours and vLLM ------------------------------------------------------------------------------------------


class Server:
    """One side that is asked over HTTP."""

    def __init__(self, process: subprocess.Popen[str], url: str, model: str) -> None:
        self._process = process
        self.url = url
        self._model = model

    def play(self, work: Work) -> Speed:
        before, began = cpu_s(self._process.pid), time.perf_counter()
        tokens = asyncio.run(self._ask(work))
        wall = time.perf_counter() - began
        assert tokens == sum(work.lengths)
        return Speed(tokens / wall, tokens / max(cpu_s(self._process.pid) - before, 0.01))

    async def _ask(self, work: Work) -> int:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=ROLLOUTS)) as session:

            async def sample(seed: int, prompt: list[int], length: int) -> int:
                sampling = {
                    "max_tokens": length,
                    "temperature": 1.0,
                    "seed": seed,
                    "logprobs": 0,
                    "ignore_eos": True,
                }
                asked = {"model": self._model, "token_ids": prompt, "sampling_params": sampling}
                async with session.post(f"{self.url}/inference/v1/generate", json=asked) as answered:
                    choice = (await answered.json())["choices"][0]
                assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
                return len(choice["token_ids"])

            seeds = range(len(work.prompts))
            asking = (sample(*one) for one in zip(seeds, work.prompts, work.lengths, strict=True))
            return sum(await asyncio.gather(*asking))


@contextmanager
def serving(name: str, model: Path, cores: list[int], root: Path, *settings: object) -> Iterator[Server]:
    """A standing server; yields once it answers."""
    log = root / f"{name}.log"
    words: list[object] = [sys.executable, "-c", "from ratchet.cli.programs import inference; inference()"]
    words += ["--model.name", model, "--inference.port", 0, "--inference.threads", len(cores), *settings]
    with started(words, cores, log) as process:
        ends = time.monotonic() + START_S
        while (found := re.search(r"serving .* at (http://\S+)", log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"{name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield Server(process, found[1], str(model))


# -- transformers -------------------------------------------------------------------------------------------


class Transformers:
    """One of the ways of the process of `peers/hf_generate.py`."""

    def __init__(self, process: subprocess.Popen[str], way: str, log: Path) -> None:
        self._process = process
        self._way = way
        self._log = log

    def play(self, work: Work) -> Speed:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        before = cpu_s(self._process.pid)
        self._process.stdin.write(json.dumps({"way": self._way, **work._asdict()}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"HF {self._way} ended:\n{self._log.read_text()[-3000:]}")
        found = json.loads(answer)
        used = cpu_s(self._process.pid) - before
        return Speed(found["tokens"] / found["wall_s"], found["tokens"] / max(used, 0.01))


@contextmanager
def transformers(
    model: Path, cores: list[int], slots: int, root: Path
) -> Iterator[Callable[[str], Transformers]]:
    """A process for all ways; yields what gives one of them by its name."""
    words = [sys.executable, HERE / "peers" / "hf_generate.py", model, len(cores), slots]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    log = root / "transformers.log"
    with started(words, cores, log, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield lambda way: Transformers(process, way, log)


# -- the run ------------------------------------------------------------------------------------------------


def compare(
    kind: str, sides: dict[str, Callable[[Work], Speed]], work: Work, spread: str, rounds: int
) -> None:
    """All sides in turn, so often; how fast each was, and how many times faster ours is."""
    found: dict[str, list[Speed]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, play in sides.items():
            found[name].append(play(work))
    for name, speeds in found.items():
        line = f"{spread:6} {name:10} {statistics.median(s.wall for s in speeds):7,.0f} tokens/s, "
        line += f"{statistics.median(s.cpu for s in speeds):7,.0f} a CPU second"
        if name != "ours":
            pairs = list(zip(found["ours"], speeds, strict=True))
            goal = GOALS.get((kind, name)) if spread == "spread" or name == "vLLM" else None
            line += f"; ours / it {statistics.median(a.wall / b.wall for a, b in pairs):.2f}"
            line += f" (CPU {statistics.median(a.cpu / b.cpu for a, b in pairs):.2f})"
            line += f", goal {goal}" if goal else ""
        say(line)


def run(arguments: argparse.Namespace, root: Path) -> None:
    cores = arguments.cores
    others = sorted(os.sched_getaffinity(0) - set(cores))
    os.sched_setaffinity(0, others or cores)
    model = make_model(arguments.kind, root)
    chat = Chat.load(str(model))
    say(
        f"cores {cores}, {len(cores)} threads a side, {arguments.slots} slots; the client on {others or cores}"
    )
    with ExitStack() as stack:
        shape = ("--inference.slots", arguments.slots, "--inference.max-model-len", MAX_MODEL_LEN)
        mine = stack.enter_context(serving("ours", model, cores, root, *shape))
        sides: dict[str, Callable[[Work], Speed]] = {"ours": mine.play}
        if arguments.vllm_python:
            choice = ("--inference.engine", "vllm", "--inference.vllm.python", arguments.vllm_python)
            theirs = stack.enter_context(serving("vllm", model, cores, root, *shape, *choice))
            sides["vLLM"] = theirs.play
        if arguments.hf:
            way = stack.enter_context(transformers(model, cores, arguments.slots, root))
            sides |= {name: way(name).play for name in arguments.hf}
        work = make_work(chat, "spread")
        warm = Work(work.prompts[:: GROUP // 2], work.lengths[:: GROUP // 2])
        for play in sides.values():
            play(warm)
        for spread in arguments.lengths:
            compare(arguments.kind, sides, make_work(chat, spread), spread, arguments.rounds)


def carry_out(run: Callable[[argparse.Namespace, Path], None], arguments: argparse.Namespace) -> None:
    """Run a benchmark below its `--root`, which is new, or in a temporary directory; nothing that it starts stays."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    end_in_order()
    if arguments.root:
        arguments.root.mkdir(parents=True)
        run(arguments, arguments.root)
        return
    with tempfile.TemporaryDirectory() as root:
        run(arguments, Path(root))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=SHAPES)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--hf", nargs="*", choices=WAYS, default=WAYS, help="of transformers, and the limit")
    parser.add_argument("--cores", type=int, nargs="+", default=[min(os.sched_getaffinity(0))])
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", choices=("spread", "equal"), default=("spread", "equal"))
    parser.add_argument(
        "--root", type=Path, help="keep model and logs there; by default a temporary directory"
    )
    arguments = parser.parse_args()
    carry_out(run, arguments)


if __name__ == "__main__":
    main()
