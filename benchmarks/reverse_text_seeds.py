"""What RL gains on reverse-text, over seeds: `uv run python benchmarks/reverse_text_seeds.py --seeds 5`.

Each seed covers everything: initial weights, order of the demonstrations, draws and sampling. Prints the held-out
reward at temperature 1 before and after RL, beside it how often the model refuses, and its reward when it answers.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from ratchet import metrics
from ratchet.paths import RunPaths

BIN = Path(sys.executable).parent
KEYS = ("reward", "refused", "answered_reward")


def run(command: str, *arguments: str) -> float:
    """Run one command; returns its wall time in seconds."""
    started = time.perf_counter()
    subprocess.run([BIN / command, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def one_seed(seed: int, root: Path) -> dict[str, float]:
    sft, rl = root / f"sft_{seed}", root / f"rl_{seed}"
    common = ("--seed", str(seed), "--output-dir")
    seconds = run("sft", "@", "examples/reverse_text/sft.toml", *common, str(sft))
    model = ("--model.name", str(sft / "weights" / "step_40"))
    seconds += run("rl", "@", "examples/reverse_text/rl.toml", *common, str(rl), *model)
    rows = metrics.read(RunPaths(rl).metric("evals"))
    found = {
        f"{key} {when}": row[f"eval/reverse_text/{key}"]
        for key in KEYS
        for when, row in (("before", rows[0]), ("after", rows[-1]))
    }
    return found | {"gain": found["reward after"] - found["reward before"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path, default=Path("outputs/seeds"))
    arguments = parser.parse_args()
    results = []
    for seed in range(arguments.seeds):
        results.append(one_seed(seed, arguments.root))
        if seed == 0:
            sys.stdout.write("seed  " + "  ".join(f"{key:>22}" for key in results[0]) + "\n")
        line = "  ".join(f"{value:22.3f}" for value in results[-1].values())
        sys.stdout.write(f"{seed:4}  {line}\n")
        sys.stdout.flush()
    gains = [result["gain"] for result in results]
    sys.stdout.write(f"gain: mean {sum(gains) / len(gains):.3f}, smallest {min(gains):.3f}\n")


if __name__ == "__main__":
    main()
