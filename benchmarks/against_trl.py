"""Ours beside TRL 1.16, alternately, in one run: `uv run python benchmarks/against_trl.py sft --trl-python PYTHON`.

    sft       337 k parameters, 40 steps of 512 phrases; ours writes a checkpoint in the middle and at the end
    rl        the same model, 20 steps of 16 x 16 rollouts of up to 14 tokens; TRL synchronous, ours three programs
    rl-large  3.3 M parameters, random: 8 steps of 256 rollouts that end anywhere up to 64 tokens

PYTHON is the interpreter of the environment that `benchmarks/peers/build_env.sh` makes. Both sides: fp32, AdamW, the
same cores. "train" is TRL's `train()`; ours is, for SFT, the steps and saves, and for RL the time from the published
policy 0 to the last update. "whole" is the command from start to end. CPU seconds are the user and system time of all
processes: the fair measure on a machine that does other things too.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ratchet import metrics
from ratchet.paths import RunPaths

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "reverse_text"
LARGE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
LARGE |= {"head_dim": 64, "intermediate_size": 768}
WORK = {  # steps, rows of a batch, tokens at most
    "sft": (40, 512, 0),
    "rl": (20, 256, 14),
    "rl-large": (8, 256, 64),
}
GOALS = {"sft": (2.5, 2.0), "rl": (2.0, 1.3), "rl-large": (3.0, None)}


RL = """
output_dir = "{root}"
max_steps = {steps}
[model]
name = "{model}"
attention = "eager"
[trainer]
precision = "fp32"
micro_batch_tokens = 2048
[trainer.optim]
lr = 1e-3
weight_decay = 0.0
[orchestrator]
batch_size = {batch}
group_size = 16
[orchestrator.sampling]
max_tokens = {tokens}
[[orchestrator.env]]
id = "reverse_text"
args = {{ data = "{data}" }}
[inference]
max_model_len = 128
slots = 128
"""


def command(name: str) -> list[str]:
    """One of our programs by its function, installed or not."""
    return [sys.executable, "-c", f"from ratchet.cli.entry import {name}; {name}()"]


def measure(words: list[object], watch: Path | None = None) -> dict[str, Any]:
    """Run a command; its output, wall and CPU seconds, and when `watch` was first there."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, appeared = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if watch is not None and not appeared and watch.exists():
                appeared = time.perf_counter() - started
            time.sleep(0.01)
        output.seek(0)
        said = output.read()
    if process.returncode != 0:
        raise SystemExit(f"{words} ended with {process.returncode}:\n{said[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"whole_s": time.perf_counter() - started, "cpu_s": cpu, "appeared": appeared, "said": said}


def trl(kind: str, python: Path, model: Path, root: Path) -> dict[str, Any]:
    steps, batch, tokens = WORK[kind]
    script = HERE / "peers" / ("trl_sft.py" if kind == "sft" else "trl_grpo.py")
    data = EXAMPLE / ("sft.jsonl" if kind == "sft" else "train.jsonl")
    threads = len(os.sched_getaffinity(0))
    found = measure([python, script, model, data, steps, batch, root, threads, tokens])
    return found | json.loads(found["said"].strip().splitlines()[-1])


def ours(kind: str, model: Path, root: Path) -> dict[str, Any]:
    return _our_sft(root) if kind == "sft" else _our_rl(kind, model, root)


def _our_sft(root: Path) -> dict[str, Any]:
    steps, batch, _ = WORK["sft"]
    threads = len(os.sched_getaffinity(0))
    own = ("--trainer.precision", "fp32", "--trainer.threads", threads, "--trainer.optim.type", "adamw")
    rate = ("--trainer.optim.lr", "3e-3", "--max-steps", steps, "--data.batch-size", batch)
    found = measure(
        [
            *command("sft"),
            "@",
            EXAMPLE / "sft.toml",
            "--output-dir",
            root,
            *own,
            *rate,
            "--ckpt.interval",
            steps // 2,
        ]
    )
    rows = metrics.read(RunPaths(root).metric("trainer"))
    logs = "\n".join(path.read_text() for path in root.rglob("trainer*.log"))
    stalls = sum(float(s) for s in re.findall(r"the loop waited ([0-9.]+) s", logs))
    train = sum(row["time/wait_s"] + row["time/train_s"] for row in rows) + stalls
    return found | {"train_s": train, "last": rows[-1]["loss"]}


def _our_rl(kind: str, model: Path, root: Path) -> dict[str, Any]:
    steps, batch, tokens = WORK[kind]
    file = root.with_suffix(".toml")
    file.write_text(
        RL.format(
            root=root, steps=steps, model=model, batch=batch, tokens=tokens, data=EXAMPLE / "train.jsonl"
        )
    )
    found = measure([*command("rl"), "@", file], RunPaths(root).weight(0))
    rows = metrics.read(RunPaths(root).metric("orchestrator"))
    ended = RunPaths(root).metric("trainer").stat().st_mtime - (time.time() - time.perf_counter())
    return found | {
        "train_s": ended - (time.perf_counter() - found["whole_s"]) - found["appeared"],
        "first": rows[0]["reward/mean"],
        "last": rows[-1]["reward/mean"],
        "mean_length": rows[-1]["completion/mean_length"],
    }


def make_model(kind: str, root: Path) -> Path:
    """What RL starts from: the example's SFT, or random weights of the larger shape."""
    if kind == "rl":
        measure(
            [*command("sft"), "@", EXAMPLE / "sft.toml", "--output-dir", root, "--trainer.precision", "fp32"]
        )
        return root / "weights" / "step_40"
    source = root.with_name("shape")
    source.mkdir()
    for path in (EXAMPLE / "model").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | LARGE
    (source / "config.json").write_text(json.dumps(config))
    own = (
        "--model.name",
        source,
        "--max-steps",
        1,
        "--trainer.optim.lr",
        "1e-9",
        "--trainer.optim.type",
        "adamw",
    )
    measure([*command("sft"), "@", EXAMPLE / "sft.toml", "--output-dir", root, *own])
    return root / "weights" / "step_1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=WORK)
    parser.add_argument("--trl-python", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="fewer steps, to try the command out")
    arguments = parser.parse_args()
    if arguments.steps is not None:
        WORK[arguments.kind] = (arguments.steps, *WORK[arguments.kind][1:])
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = EXAMPLE / "model" if arguments.kind == "sft" else make_model(arguments.kind, root / "start")
        pairs = []
        for i in range(arguments.repeats):
            theirs = trl(arguments.kind, arguments.trl_python, model, root / f"trl_{i}")
            mine = ours(arguments.kind, model, root / f"ours_{i}")
            pairs.append((mine, theirs))
            for who, one in (("ours", mine), ("TRL", theirs)):
                facts = {
                    k: round(v, 3) for k, v in one.items() if k not in ("said", "appeared", "train_cpu_s")
                }
                sys.stdout.write(f"{who:5} {facts}\n")
                sys.stdout.flush()
    for key, goal in zip(("train_s", "whole_s", "cpu_s"), (*GOALS[arguments.kind], None), strict=True):
        ratio = statistics.median(theirs[key] / mine[key] for mine, theirs in pairs)
        sys.stdout.write(f"{key:8} TRL / ours {ratio:.2f}" + (f" (goal {goal})\n" if goal else "\n"))


if __name__ == "__main__":
    main()
