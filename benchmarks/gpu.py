"""Trainer, weight update and engine on one GPU: `python benchmarks/gpu.py`, without a network, in under ten minutes.

The trainer on several: `torchrun --nproc-per-node 2 benchmarks/gpu.py --only trainer`, a sequence a step for each.

Random weights of the shape of Qwen3-0.6B. Each trainer row is one sequence a step, the optimizer's update included.
Before it is timed, each variant runs one batch twice at learning rate 0 and must give the same bits. Published rows of
prime-rl come from one H100 with full recompute; MFU counts causal attention once and no recompute.
"""

import argparse
import functools
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.nn.functional as F

from ratchet import durable, weights
from ratchet.attempts import Assignment, Plan
from ratchet.config import ModelConfig, OptimConfig, RLConfig, RLTrainerConfig, SFTConfig, TrainerConfig
from ratchet.inference import adoption
from ratchet.inference.engine import Engine, Sequence
from ratchet.inference.slots import SlotModel
from ratchet.memory import Memory
from ratchet.models import attention as own_attention
from ratchet.models.build import build
from ratchet.models.device import choose
from ratchet.paths import RunPaths
from ratchet.stage import Stage
from ratchet.timeline import Timeline
from ratchet.trainer.packing import Example
from ratchet.trainer.publish import Publisher
from ratchet.trainer.source import Batch
from ratchet.trainer.update import Outcome, Updater, open_updater
from ratchet.trainer.world import World, open_world, set_determinism

TINY = Path("examples/reverse_text/model")
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
}
PARAMETERS = 596_049_920
SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 65536}
PEAK_FLOPS = 989e12  # bf16, dense, H100 SXM and H200
PRIME_RL = {  # tokens/s and GiB
    ("sft", 8192): (26.0e3, 31.7),
    ("sft", 16384): (25.5e3, 52.8),
    ("rl", 16384): (11.9e3, 12.5),
    ("rl", 65536): (10.1e3, 19.6),
}


def say(name: str, value: object) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    sys.stdout.write(f"{name:68} {value}\n")
    sys.stdout.flush()


def flops_of(tokens: int) -> float:
    """Of one forward and backward pass over one sequence."""
    attention = 3 * 2 * tokens**2 * SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    return 6 * PARAMETERS * tokens + attention * SHAPE["num_hidden_layers"]


def write_model(directory: Path) -> None:
    """A config of the wanted shape with the example's tokenizer."""
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "config.json").read_text()) | SHAPE
    (directory / "config.json").write_text(json.dumps(config))


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def settle() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time on an idle GPU, after one run that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def profile(function: Callable[[], object], rows: int = 22) -> None:
    """Which kernels the time goes to."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        function()
        torch.cuda.synchronize()
    kernels = [
        e for e in recorded.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"
    ]
    total = sum(e.self_device_time_total for e in kernels)
    sys.stdout.write(f"  {total / 1e3:.1f} ms of kernels\n")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:rows]:
        sys.stdout.write(f"  {e.self_device_time_total / 1e3:8.2f} ms {e.count:5} x {e.key[:96]}\n")
    calls = [e for e in recorded.key_averages() if e.device_type.name == "CPU"]
    host = sum(e.self_cpu_time_total for e in calls)
    sys.stdout.write(f"  {host / 1e3:.1f} ms of the host, recording included\n")
    for e in sorted(calls, key=lambda e: -e.self_cpu_time_total)[:rows]:
        sys.stdout.write(f"  {e.self_cpu_time_total / 1e3:8.2f} ms {e.count:5} x {e.key[:96]}\n")


# -- trainer ------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How a row is computed: the value of `trainer.activation_checkpointing`, and the layers."""

    recompute: str
    layers: str
    """`eager`, `compiled`, or `recorded`: compiled, and the passes a CUDA graph."""


def settings(kind: str, model: Path, tokens: int, way: Way) -> SFTConfig | RLConfig:
    own: dict[str, Any] = {
        "micro_batch_tokens": tokens,
        "activation_checkpointing": way.recompute,
        "compile": way.layers != "eager",
        "cuda_graphs": way.layers == "recorded",
        "optim": OptimConfig(lr=1e-5),
    }
    shape = {"name": str(model), "random_init": True, "attention": "sdpa"}
    shared: dict[str, Any] = {"output_dir": "unused", "max_steps": 10, "model": ModelConfig(**shape)}
    if kind == "sft":
        return SFTConfig(**shared, data={"name": "unused"}, trainer=TrainerConfig(**own))  # pyright: ignore
    orchestrator = {"env": [{"id": "reverse_text", "args": {"data": "unused"}}]}
    return RLConfig(**shared, trainer=RLTrainerConfig(**own), orchestrator=orchestrator)  # pyright: ignore


def batch_of(tokens: int, sequences: int) -> Batch:
    """Every token is trained."""
    chance = np.random.default_rng(0)
    rows = [chance.integers(2, SHAPE["vocab_size"], tokens + 1).tolist() for _ in range(sequences)]
    return Batch([Example(ids, [True] * len(ids), [-12.0] * len(ids), 0.5) for ids in rows])


def pace(updater: Updater, batch: Batch, *, is_read_late: bool, repeats: int = 6) -> float:
    """Seconds a step, as the trainer's loop takes them: SFT reads the figures of a step during the next one, RL before
    it publishes."""
    updater.update(batch, 1, 1.0)
    unread: Outcome | None = None
    started = time.perf_counter()
    for _ in range(repeats):
        outcome = updater.begin(batch, 1, 1.0)
        if unread is not None:
            unread.read()
        if is_read_late:
            unread = outcome
        else:
            outcome.read()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def trainer_row(
    kind: str, tokens: int, way: Way, root: Path, world: World, *, is_profiled: bool
) -> dict[str, float] | None:
    """Returns: the figures of an update, None where it does not fit."""
    name = f"{kind} {tokens}, recompute {way.recompute}, {way.layers}"
    clear()
    try:
        config = settings(kind, root / "model", tokens, way)
        updater = open_updater(build(config.model, seed=0), config, world)
        batch = batch_of(tokens, world.size)
        first, second = (updater.update(batch, 0, 0.0) for _ in range(2))
        step = pace(updater, batch, is_read_late=kind == "sft")
    except torch.OutOfMemoryError:
        say(name, "out of memory")
        return None
    rate, mfu = world.size * tokens / step, flops_of(tokens) / step / PEAK_FLOPS
    peak = torch.cuda.max_memory_allocated() / 2**30
    peer_rate, peer_peak = PRIME_RL[kind, tokens]
    repeats = "bits repeat" if first == second else "BITS DO NOT REPEAT"
    say(
        name,
        f"{rate:8,.0f} tok/s ({rate / world.size / peer_rate:.2f}x prime-rl a GPU) MFU {mfu:.1%}, peak {peak:.1f} GiB "
        f"(prime-rl {peer_peak}), {repeats}",
    )
    if is_profiled:
        profile(lambda: updater.update(batch, 1, 1.0))
    return first


def trainer(root: Path, world: World, layers: list[str], points: list[str], *, is_profiled: bool) -> None:
    for kind, tokens in (("sft", 8192), ("sft", 16384), ("rl", 16384), ("rl", 65536)):
        if points and f"{kind}{tokens}" not in points:
            continue
        fits = tokens < 40_000  # activations of 65 536 tokens do not, without recompute
        kinds = ("none", "full") if fits else ("attention", "full")
        ways = {
            "eager": [Way(kind, "eager") for kind in kinds],
            "compiled": [Way(kind, "compiled") for kind in (kinds[:1] if fits else kinds)],
            "recorded": [Way("none", "recorded")] if fits and world.size == 1 else [],
        }
        found = {
            way: trainer_row(kind, tokens, way, root, world, is_profiled=is_profiled)
            for wanted in layers
            for way in ways[wanted]
        }
        compiled, recorded = Way("none", "compiled"), Way("none", "recorded")
        if {compiled, recorded} <= found.keys():
            one, two = found[compiled], found[recorded]
            is_same = one is not None and one == two
            say(
                "  recorded passes give the loss and gradient norm of those that are not",
                "yes" if is_same else "NO",
            )


# -- what attention allows ----------------------------------------------------------------------------------


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    yield
    torch.use_deterministic_algorithms(True)


def attention() -> None:
    """Attention of one layer, forward and backward, by kernel: most of the work of a long sequence."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, groups, size = (SHAPE[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for tokens in (8192, 65536):
        for name in own_attention.KERNELS:
            own_row(name, tokens)
        shapes = [(1, n, tokens, size) for n in (heads, groups, groups)]
        q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        flops = 2 * tokens**2 * heads * size
        for backend, is_deterministic in (
            (SDPBackend.FLASH_ATTENTION, True),
            (SDPBackend.FLASH_ATTENTION, False),
            (SDPBackend.CUDNN_ATTENTION, False),
            (SDPBackend.CUDNN_ATTENTION, True),
        ):
            name = f"attention {tokens}, {backend.name.lower()}, deterministic {is_deterministic}"
            forward = functools.partial(
                F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True
            )
            both_passes = functools.partial(lambda run: run().sum().backward(), forward)
            try:
                with deterministic(is_deterministic), sdpa_kernel(backend):
                    ahead, both = seconds(forward, 5), seconds(both_passes, 5)
            except RuntimeError as error:
                say(name, f"refused: {str(error).splitlines()[0][:60]}")
                continue
            back = both - ahead
            say(
                name,
                f"forward {flops / ahead / 1e12:.0f}, backward {2.5 * flops / back / 1e12:.0f} TFLOP/s, "
                f"28 layers {28e3 * both:.0f} ms",
            )


def own_row(name: str, tokens: int) -> None:
    """What training uses: `ratchet.models.attention`."""
    heads, groups, size = (SHAPE[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    # Positions before heads, as the projections leave them.
    shapes = [(1, tokens, n, size) for n in (heads, groups, groups)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    slope = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    flops = 2 * tokens**2 * heads * size

    def forward() -> torch.Tensor:
        q, k, v = (one.transpose(1, 2) for one in inputs)
        return own_attention.KERNELS[name](q, k, v, None, size**-0.5)

    def both_passes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, slope)

    try:
        ahead, both = seconds(forward, 5), seconds(both_passes, 5)
        repeats = all(
            torch.equal(one, two)
            for _ in range(10)
            for one, two in zip(both_passes(), both_passes(), strict=True)
        )
    except Exception as error:  # a package or a compiler that is not there
        say(f"attention {tokens}, ours ({name})", f"{type(error).__name__}: {str(error)[:200]}")
        return
    say(
        f"attention {tokens}, ours ({name}), {'bits repeat' if repeats else 'BITS DO NOT REPEAT'}",
        f"forward {flops / ahead / 1e12:.0f}, backward {2.5 * flops / (both - ahead) / 1e12:.0f} TFLOP/s, "
        f"28 layers {28e3 * both:.0f} ms",
    )


# -- weights ------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """One policy on its way, in seconds."""

    gather_s: float
    publish_s: float
    """From the gathered tensors to a policy that a server may adopt."""
    adopt_s: float
    all_s: float
    """From the trainer's tensors to those that the server computes with."""
    plain_s: float
    """The same bytes: device, file and fsync, device."""


def publish(root: Path, world: World, memory_dir: Path, repeats: int = 5) -> None:
    """From the trainer's tensors to a policy that the server computes with, against the same bytes moved plainly.

    By the trainer's publisher and the server's reader, policy after policy, each pruned when the next one is adopted.
    """
    found = {
        transport: [*moves(root, transport, world, memory_dir, repeats)]
        for transport in ("filesystem", "memory")
    }
    size = sum(path.stat().st_size for path in (root / "run_memory").rglob("*.safetensors"))
    say(f"one policy, {world.device.type}, the disk is {root}", f"{size / 1e9:.2f} GB")
    for transport, rows in found.items():
        middle = Move(*(statistics.median(values) for values in zip(*rows[1:], strict=True)))
        first = rows[0].all_s
        say(
            f"  {transport}: trained -> adopted, median of {len(rows) - 1}",
            f"{middle.all_s:.2f} s (gather {middle.gather_s:.2f}, publish {middle.publish_s:.2f}, "
            f"adopt {middle.adopt_s:.2f}; the first {first:.2f}), {middle.all_s / middle.plain_s:.2f}x plain",
        )


def moves(root: Path, transport: str, world: World, memory_dir: Path, repeats: int) -> Iterator[Move]:
    """Policies one after the other; the first one gets its memory from the kernel."""
    config = RLConfig.model_validate(
        {
            "model": {"name": str(root / "model"), "random_init": True},
            "max_steps": repeats + 1,
            "weights": {"transport": transport, "memory_dir": str(memory_dir)}
            | ({"publish_interval": repeats + 2} if transport == "memory" else {}),
        }
    )
    device = world.device
    trained = build(config.model, seed=0, device=device)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    served = build(config.model, seed=1, device=device, dtype=kind).requires_grad_(False)
    paths = RunPaths(root / f"run_{transport}")
    for directory in (paths.staging, paths.weights):
        directory.mkdir(parents=True, exist_ok=True)
    assignment = Assignment(
        paths=paths,
        config=config,
        plan=Plan(),
        attempt=1,
        run_id=f"benchmark{os.getpid()}",
        lineage=0,
        stage=Stage.open(paths, "benchmark"),
    )
    memory = Memory.open(config, assignment.run_id, 1)
    publisher = Publisher(assignment, world, Timeline(None))
    places = weights.Places(paths, assignment.memory)
    network = adoption.architecture(served.config)
    try:
        for step in range(repeats + 1):
            with torch.no_grad():
                next(trained.parameters()).add_(1e-3)
            settle()
            started = time.perf_counter()
            publisher.publish(trained, step)
            gathered = time.perf_counter()
            while not places.is_published(step):
                publisher.poll()
                time.sleep(1e-4)
            published = time.perf_counter()
            policy = places.read_policy(step, run_id=assignment.run_id, lineage=0)
            assert policy is not None
            (directory, *_) = places.directories(policy)
            read = adoption.read(directory, network, policy.digest)
            adoption.copier(served, read)()
            settle()
            adopted = time.perf_counter()
            del read
            publisher.wait()
            publisher.prune(step, step, 0)
            for old in durable.steps(paths.weights)[:-1]:
                assignment.stage.remove(paths.weight(old))
            plain = plain_move(trained, root / "plain")
            yield Move(
                gathered - started, published - gathered, adopted - published, adopted - started, plain
            )
    finally:
        if memory is not None:
            memory.close()


def plain_move(model: Any, path: Path) -> float:
    """Device to host, one raw write with fsync, read, host to device: of the same bytes."""
    here = torch.cat([tensor.detach().flatten().view(torch.uint8) for tensor in model.parameters()])
    settle()
    started = time.perf_counter()
    data = here.cpu().numpy()
    with path.open("wb") as file:
        file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    torch.from_numpy(np.fromfile(path, dtype=np.uint8)).to(here.device)
    settle()
    return time.perf_counter() - started


# -- engine -------------------------------------------------------------------------------------------------


def prompts_of(count: int, group: int, length: int) -> list[list[int]]:
    chance = np.random.default_rng(1)
    return [p for _ in range(count // group) for p in [chance.integers(2, 60, length).tolist()] * group]


def engine(root: Path, *, is_profiled: bool) -> None:
    """Tokens a second of 256 rollouts over 128 slots, against eager and against HF `generate`."""
    model = build(
        ModelConfig(name=str(root / "model"), random_init=True), seed=0, device="cuda", dtype=torch.bfloat16
    )
    lengths = np.random.default_rng(2).integers(16, 257, 256).tolist()

    def play(slot_model: SlotModel, limit: int) -> tuple[float, list[Any]]:
        runner = Engine(slot_model, lambda ids: "")
        wanted = [
            Sequence(prompt, min(limit, length), 1.0, seed)
            for seed, (prompt, length) in enumerate(zip(prompts_of(256, 16, 100), lengths, strict=True))
        ]
        for sequence in wanted:
            runner.submit(sequence)
        torch.cuda.synchronize()
        started = time.perf_counter()
        runner.run()
        return runner.tokens_sampled / (time.perf_counter() - started), [
            (s.token_ids, s.logprobs) for s in wanted
        ]

    recorded = SlotModel(model, 128, 512)
    play(recorded, 256)
    rate, _ = play(recorded, 256)
    _, short = play(recorded, 24)
    plain = SlotModel(model, 128, 512)
    plain._graphs._records = False  # the same code without recording
    eager_rate, eager_short = play(plain, 24)
    say("engine, 128 slots, 256 rollouts of 16-256 tokens", f"{rate:,.0f} tok/s")
    say("  without graphs (24 tokens at most)", f"{eager_rate:,.0f} tok/s")
    same = [a == b for a, b in zip(short, eager_short, strict=True)]
    say("  results equal to those without graphs, bit for bit", f"{sum(same)} of {len(same)}")
    bare_decode(recorded, is_profiled=is_profiled)
    hf_generate(model, lengths)


def bare_decode(slot_model: SlotModel, *, is_profiled: bool) -> None:
    """One decode step alone, against reading the weights once."""
    inputs = [
        torch.ones(128, dtype=torch.int64),
        torch.full((128,), 200),
        torch.ones(128).double(),
        torch.rand(128).double(),
    ]
    step = seconds(lambda: slot_model.sample(*inputs), 20)
    if is_profiled:
        profile(lambda: slot_model.sample(*inputs))
    store = torch.empty(PARAMETERS, dtype=torch.bfloat16, device="cuda")
    read = seconds(lambda: store.view(torch.int64).sum(), 20)
    say(
        "  one decode step, 128 slots, span 256",
        f"{1e3 * step:.2f} ms; reading the weights once {1e3 * read:.2f} ms",
    )


def hf_generate(model: Any, lengths: list[int]) -> None:
    """The same rollouts in two batches of 128, each as long as its longest."""
    model.set_attn_implementation("sdpa")
    prompts = torch.tensor(prompts_of(256, 16, 100), device="cuda")
    torch.use_deterministic_algorithms(False)
    total, spent = 0, 0.0
    for part, some in ((prompts[:128], lengths[:128]), (prompts[128:], lengths[128:])):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            part,
            attention_mask=torch.ones_like(part),
            max_new_tokens=max(some),
            min_new_tokens=max(some),
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        spent += time.perf_counter() - started
        total += sum(some)
    torch.use_deterministic_algorithms(True)
    say("  HF generate, same rollouts, useful tokens", f"{total / spent:,.0f} tok/s")


PARTS = ("attention", "trainer", "publish", "engine")
LAYERS = ("eager", "compiled", "recorded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS, help="of the trainer's rows")
    parser.add_argument("--points", nargs="+", default=[], help="such as sft8192; by default all four")
    parser.add_argument("--profile", action="store_true", help="also say which kernels the time goes to")
    parser.add_argument("--root", type=Path, help="on the disk to measure; by default a temporary directory")
    parser.add_argument("--cpu", action="store_true", help="with --only publish: a small model, on the CPU")
    parser.add_argument("--memory-dir", type=Path, default=Path("/dev/shm"), help="a tmpfs")
    arguments = parser.parse_args()
    if arguments.cpu:
        assert arguments.only == ["publish"], "--cpu goes with --only publish"
        say("device", f"CPU, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}")
        SHAPE.update(SMALL)
        set_determinism(1)
        with tempfile.TemporaryDirectory(dir=arguments.root) as root:
            write_model(Path(root) / "model")
            publish(Path(root), open_world(choose("cpu")), arguments.memory_dir)
        return
    set_determinism(8)
    world = open_world(choose("cuda"))
    say("device", f"{world.size} {torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=arguments.root) as root:
        write_model(Path(root) / "model")
        if "engine" in arguments.only:
            engine(Path(root), is_profiled=arguments.profile)
        clear()
        if "publish" in arguments.only:
            publish(Path(root), world, arguments.memory_dir)
        clear()
        if "attention" in arguments.only:
            attention()
        if "trainer" in arguments.only:
            trainer(Path(root), world, arguments.layers, arguments.points, is_profiled=arguments.profile)


if __name__ == "__main__":
    main()
