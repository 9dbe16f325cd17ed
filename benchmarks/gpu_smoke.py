"""SFT, RL and resume on one GPU without a network: `python benchmarks/gpu_smoke.py --root DIR`.

First the reverse-text example, small, for exactness: does a stopped and resumed run end with the digest of one that
was not stopped, on this GPU? Then a random model of the shape of Qwen3-0.6B, for size and speed: SFT with a checkpoint
in the middle and a resume, and asynchronous RL. Every figure comes from the runs' own metric rows.

In the first part, `--nproc 2` trains on two GPUs, by NCCL, of which the server shares the last; `--recorded` trains in
bf16 with compiled layers and recorded passes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from ratchet import digest, metrics
from ratchet.paths import RunPaths

TINY = Path("examples/reverse_text/model")
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
}


def run(command: str, *arguments: object) -> float:
    """Run one of our commands by its function, installed or not; returns seconds."""
    code = f"from ratchet.cli.programs import {command}; {command}()"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{command} {arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def rate(root: Path, role: str = "trainer") -> float:
    """Tokens a second of the later half of a run's steps."""
    rows = metrics.read(RunPaths(root).metric(role))
    later = rows[len(rows) // 2 :]
    return sum(row["perf/tokens_per_s"] for row in later) / len(later)


def say(name: str, value: object) -> None:
    sys.stdout.write(f"{name:58} {value}\n")
    sys.stdout.flush()


def exactness(root: Path, nproc: int, *, is_recorded: bool) -> None:
    """Stopped and resumed against uninterrupted, by digest."""
    small = ("--model.name", TINY, "--model.random-init")
    ranks = () if nproc == 1 else ("--trainer.nproc", nproc)
    recorded = ("--trainer.compile", "--trainer.cuda-graphs", "--trainer.precision", "bf16")
    own = (*ranks, *(recorded if is_recorded else ()))
    sft = ("@", "examples/reverse_text/sft.toml", *own)
    last = () if nproc == 1 else ("--inference.devices", f'["{nproc - 1}"]')
    rl = (
        *("@", "examples/reverse_text/rl.toml", *small, *own, *last, "--deterministic"),
        *("--inference.slots", "64"),
        *("--orchestrator.eval.interval", "10", "--orchestrator.eval.tasks", "64"),
    )
    for command, flags, half, whole in (("sft", sft, 20, 40), ("rl", rl, 10, 20)):
        one, two = root / f"{command}_whole", root / f"{command}_parts"
        seconds = run(command, *flags, "--output-dir", one, "--ckpt.interval", half)
        run(command, *flags, "--output-dir", two, "--max-steps", half, "--ckpt")
        run(command, *flags, "--output-dir", two, "--max-steps", whole, "--ckpt.resume-step", half)
        same = digest.run_digest(one) == digest.run_digest(two)
        say(f"{command}: {half} + {whole - half} steps equal {whole} by digest", "yes" if same else "NO")
        say(f"{command}: {whole} steps, whole command, seconds", f"{seconds:.1f}")


def write_model(directory: Path) -> None:
    """A config of the wanted shape with the example's tokenizer."""
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "config.json").read_text()) | SHAPE
    (directory / "config.json").write_text(json.dumps(config))


def size(root: Path) -> None:
    """The shape of Qwen3-0.6B: SFT, resume and RL."""
    model = root / "model"
    write_model(model)
    base = ("--model.name", model, "--model.random-init", "--model.attention", "sdpa")
    adamw = ("--trainer.optim.type", "adamw", "--trainer.optim.lr", "1e-5")
    sft = ("@", "examples/reverse_text/sft.toml", *base, *adamw, "--data.batch-size", "512")
    out = ("--output-dir", root / "big_sft", "--trainer.micro-batch-tokens", "16384", "--ckpt.keep-last", "1")
    run("sft", *sft, *out, "--max-steps", "6")
    say("Qwen3-0.6B shape: SFT, short sequences, tokens/s", f"{rate(root / 'big_sft'):,.0f}")
    run("sft", *sft, *out, "--max-steps", "8", "--ckpt.resume-step", "6", "--ckpt.save-async")
    say(
        "Qwen3-0.6B shape: resumed SFT at step",
        metrics.read(RunPaths(root / "big_sft").metric("trainer"))[-1]["step"],
    )
    shutil.rmtree(root / "big_sft")
    rl = (
        "@",
        "examples/reverse_text/rl.toml",
        *base,
        *adamw,
        "--max-steps",
        "6",
        "--orchestrator.eval.tasks",
        "16",
    )
    run(
        "rl",
        *rl,
        "--output-dir",
        root / "big_rl",
        "--inference.dtype",
        "bfloat16",
        "--inference.slots",
        "128",
    )
    say("Qwen3-0.6B shape: RL, trainer, tokens/s", f"{rate(root / 'big_rl'):,.0f}")
    say("Qwen3-0.6B shape: RL, generation, tokens/s", f"{rate(root / 'big_rl', 'orchestrator'):,.0f}")
    row = metrics.read(RunPaths(root / "big_rl").metric("trainer"))[-1]
    say("Qwen3-0.6B shape: RL, mismatch of bf16 engine and trainer (KL)", f"{row['policy/mismatch_kl']:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--nproc", type=int, default=1, help="GPUs that train in the first part")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--only", choices=("exactness", "size"))
    arguments = parser.parse_args()
    if arguments.recorded and (arguments.nproc > 1 or arguments.only != "exactness"):
        parser.error("--recorded goes with --only exactness, on one GPU")
    shutil.rmtree(arguments.root, ignore_errors=True)
    arguments.root.mkdir(parents=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say("device", f"{name}, torch {torch.__version__}")
    if arguments.only != "size":
        exactness(arguments.root, arguments.nproc, is_recorded=arguments.recorded)
    if arguments.only != "exactness":
        size(arguments.root)


if __name__ == "__main__":
    main()
