"""Asynchronous RL beside synchronous, alternately, in one run: `uv run python benchmarks/async_sync.py`.

The same run with max_async_level 0, where generation waits for each policy, and 1 (the default), where it goes on. The
trainer has a core of its own, the engine another, which it shares with the orchestrator where there are only two.
Random weights that hardly move (learning rate 1e-6), so every step has the same work: 256 rollouts of up to 20 tokens.

    generate, train   medians of the synchronous run's phases (timeline/), from the first draw to the last answer, and
                      from batch to policy; what lies between them is the rest of its step
    limit             max(generate, train) / (generate + train): all of the shorter phase beside the longer one
    ratio             time of an asynchronous step / of a synchronous one; goal: at most 1.1 times the limit

Only the steps after the first few count. `--shape` sets who is the slower one.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from engine import carry_out, serving

from ratchet import timeline
from ratchet.paths import RunPaths

EXAMPLE = Path(__file__).parent.parent / "examples" / "reverse_text"
FIRST_STEPS = 4
SHAPES = {  # what differs from the example's model of 337 k parameters
    "tiny": {},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64, "intermediate_size": 768},
}
RUN = """
output_dir = "{root}"
max_steps = {steps}
max_async_level = {level}
[model]
name = "{model}"
random_init = true
attention = "eager"
[trainer]
precision = "fp32"
micro_batch_tokens = 2048
[trainer.optim]
lr = 1e-6
[orchestrator]
batch_size = 256
group_size = 16
[orchestrator.client]
base_url = "{url}"
[orchestrator.sampling]
max_tokens = 20
[[orchestrator.env]]
id = "reverse_text"
args = {{ data = "{data}" }}
"""


class Phases(NamedTuple):
    """Seconds of the usual step of one run."""

    step: float
    generate: float
    train: float
    wait: float
    """The trainer's, for a batch."""

    @property
    def limit(self) -> float:
        return max(self.generate, self.train) / (self.generate + self.train)


def make_model(shape: str, root: Path) -> Path:
    model = root / "model"
    shutil.copytree(EXAMPLE / "model", model)
    changes = dict(SHAPES[shape])
    if changes:
        changes["layer_types"] = ["full_attention"] * changes["num_hidden_layers"]
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    return model


def start(name: str, file: Path, core: int, output: IO[str]) -> subprocess.Popen[bytes]:
    code = f"from ratchet.cli.programs import {name}; {name}()"
    words = ["taskset", "-c", str(core), sys.executable, "-c", code, "@", str(file)]
    return subprocess.Popen(words, stdout=output, stderr=output)


def play(root: Path, model: Path, url: str, level: int, steps: int, cores: tuple[int, int, int]) -> Phases:
    """One run, from scratch to its last step."""
    file = root.with_suffix(".toml")
    text = RUN.format(root=root, model=model, url=url, level=level, steps=steps, data=EXAMPLE / "train.jsonl")
    file.write_text(text)
    log, programs = root.with_suffix(".log"), []
    with log.open("w") as output:
        try:
            programs.append(start("trainer", file, cores[0], output))
            while programs[0].poll() is None and not list((root / "attempts").glob("*/record.json")):
                time.sleep(0.05)  # the orchestrator joins an attempt that is open
            programs.append(start("orchestrator", file, cores[2], output))
            while any(one.poll() is None for one in programs) and not any(one.poll() for one in programs):
                time.sleep(0.05)
        finally:
            for program in programs:
                program.terminate()  # one that is left has lost the other
    if codes := [code for program in programs if (code := program.wait())]:
        raise SystemExit(f"the run ended with {codes}:\n{log.read_text()[-3000:]}")
    return phases(RunPaths(root))


def phases(paths: RunPaths) -> Phases:
    """The usual step, from the timelines."""
    spans = [*timeline.read(paths.timeline("trainer")), *timeline.read(paths.timeline("orchestrator"))]
    spans = [span for span in spans if span.step > FIRST_STEPS]
    spent: dict[str, dict[int, float]] = {}
    for span in spans:
        steps = spent.setdefault(span.phase, {})
        steps[span.step] = steps.get(span.step, 0.0) + span.end - span.start
    ends = sorted(span.end for span in spans if span.phase == "train")
    step = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return Phases(step, *(statistics.median(spent[name].values()) for name in ("generate", "train", "wait")))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(arguments: argparse.Namespace, root: Path) -> None:
    available = sorted(os.sched_getaffinity(0))
    trainer, engine, orchestrator = available[0], available[1 % len(available)], available[2 % len(available)]
    if len(available) < 3:
        orchestrator = engine
    say(f"trainer on core {trainer}, engine on core {engine}, orchestrator on core {orchestrator}")
    model = make_model(arguments.shape, root)
    own = ("--model.random-init", "--inference.slots", arguments.slots, "--inference.max-model-len", 64)
    pairs = []
    with ExitStack() as stack:
        url = stack.enter_context(serving("engine", model, [engine], root, *own)).url
        for i in range(arguments.rounds):
            found = [
                play(
                    root / f"{name}_{i}", model, url, level, arguments.steps, (trainer, engine, orchestrator)
                )
                for name, level in (("sync", 0), ("async", arguments.level))
            ]
            pairs.append(found)
            for name, one in zip(("sync", "async"), found, strict=True):
                said = ", ".join(f"{key} {value:.3f} s" for key, value in one._asdict().items())
                say(f"{name:5} {said}" + (f"; limit {one.limit:.2f}" if name == "sync" else ""))
    ratio = statistics.median(other.step / sync.step for sync, other in pairs)
    limit = statistics.median(sync.limit for sync, _ in pairs)
    say(f"async / sync {ratio:.2f}, limit {limit:.2f}, gap {ratio / limit - 1:+.0%} (goal: at most +10%)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--level", type=int, default=1, help="max_async_level of the asynchronous run")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--root", type=Path, help="keep the runs there; by default a temporary directory")
    arguments = parser.parse_args()
    carry_out(run, arguments)


if __name__ == "__main__":
    main()
