"""From relaunch to the first new step: `uv run python benchmarks/resume.py --root outputs/resume`.

The tiny SFT and RL examples with small batches are killed (SIGKILL, all programs) and started by the same command.
New is a step that is newer than any before the kill. Beside it, in alternation, what no program can do without: a
Python process that imports torch. Goal: at most 2x. Then where the time went, from the timelines of one relaunch.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ratchet import attempts, metrics, timeline
from ratchet.paths import RunPaths

BIN = Path(sys.executable).parent
COMMON = ("--ckpt.interval", "1", "--ckpt.keep-last", "2", "--max-steps", "100000")
COMMANDS = {
    "sft": ("@", "examples/reverse_text/sft.toml", "--trainer.threads", "1", "--data.batch-size", "16"),
    "rl": (
        *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
        *("--model.random-init", "--inference.slots", "16", "--orchestrator.eval.tasks", "8"),
        *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
        *("--orchestrator.sampling.max-tokens", "6"),
    ),
}
STEPS_BETWEEN = 4
TIMEOUT_S = 180.0


def processes_of(root: Path) -> dict[str, float]:
    """The programs of a run that are alive, by their command lines, and when each was started, by the wall clock."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ticks = int((path / "stat").read_text().rpartition(")")[2].split()[19])
        except (FileNotFoundError, ProcessLookupError):
            continue
        modules = [word for word in words if word.startswith("ratchet.")]
        if modules and str(root) in words:
            found[modules[0].removeprefix("ratchet.")] = booted + ticks / os.sysconf("SC_CLK_TCK")
    return found


def wait_until(claim: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not claim():
        assert time.monotonic() < deadline, "the awaited event did not come"
        time.sleep(0.02)


class Example:
    """One run that is killed and started again."""

    def __init__(self, kind: str, root: Path) -> None:
        self._command = [str(BIN / kind), *COMMANDS[kind], *COMMON, "--output-dir", str(root)]
        self._root = root
        self._born: dict[str, float] = {}
        """When each program of the newest relaunch was started."""
        self.paths = RunPaths(root)

    def _rows(self) -> list[metrics.Row]:
        return metrics.read(self.paths.metric("trainer"))

    def _last(self) -> int:
        return max((row["step"] for row in self._rows()), default=0)

    def relaunch(self) -> tuple[float, float]:
        """Start it, let it make some steps, kill it. Returns when it was started, and seconds to the first new step."""
        last, started = self._last(), time.time()
        process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: self._last() >= last + STEPS_BETWEEN or process.poll() is not None)
            assert process.poll() is None, f"it ended with {process.returncode}"
            self._born = processes_of(self._root)
            first = next(row for row in self._rows() if row["step"] > last)
        finally:
            process.kill()
            process.wait()
            wait_until(lambda: not processes_of(self._root))
        return started, first["time/at_s"] - started

    def split(self, started: float) -> list[str]:
        """The first phase of each kind that each program of the newest attempt went through, in seconds."""
        attempt = attempts.numbers(self.paths)[-1]
        lines = [
            f"  {role:14} process    {born - started:6.2f} s" for role, born in sorted(self._born.items())
        ]
        for role in timeline.roles(self.paths):
            seen: set[str] = set()
            for span in timeline.read(self.paths.timeline(role)):
                if span.attempt == attempt and span.phase not in seen:
                    seen.add(span.phase)
                    where = f"{span.start - started:6.2f} .. {span.end - started:6.2f} s"
                    lines.append(f"  {role:14} {span.phase:10} {where}  (step {span.step})")
        return lines


def import_torch() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("outputs/resume"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        root = (arguments.root / kind).absolute()
        shutil.rmtree(root, ignore_errors=True)
        example = Example(kind, root)
        example.relaunch()  # the run begins; and files are in the page cache
        ours, torch, started = [], [], 0.0
        for _ in range(arguments.repeats):
            torch.append(import_torch())
            started, seconds = example.relaunch()
            ours.append(seconds)
        ratio = statistics.median(o / t for o, t in zip(ours, torch, strict=True))
        shown = f"{statistics.median(ours):.2f} s to the first new step, import torch {statistics.median(torch):.2f} s"
        sys.stdout.write(f"{kind}: {shown}: {ratio:.2f}x (goal 2x)\n")
        sys.stdout.write("\n".join(example.split(started)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
