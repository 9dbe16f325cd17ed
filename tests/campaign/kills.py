"""The kill campaign: the real programs, killed at random instants until a number of kills is reached.

    uv run python tests/campaign/kills.py --kills 300 --root outputs/campaign

A scenario is one run in one mode. It is started, waited for until it makes progress, and then a victim is killed
with SIGKILL after a random delay, again and again; the last start runs to its end. Afterwards everything is
compared with a run of the same settings that nobody disturbed. The same command continues an interrupted campaign.

It prints kills by victim and mode, and counts of what must be zero: commits lost, draws lost or doubled, damaged
directories, differing digests, replays that differ, processes that outlived their launcher.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import BIN, kill, last_step, processes_of, run_digest, start
from ratchet import durable
from ratchet.paths import RunPaths

MODEL = ("--model.name", "examples/reverse_text/model", "--model.random-init")
RL = (
    *(
        "@",
        "examples/reverse_text/rl.toml",
        *MODEL,
        "--inference.slots",
        "16",
        "--orchestrator.eval.tasks",
        "8",
    ),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--max-steps", "16"),
)
SFT = ("@", "examples/reverse_text/sft.toml", "--data.batch-size", "16")
KEEP = ("--ckpt.interval", "2", "--ckpt.keep-last", "2")
ASYNC = ("--ckpt.interval", "3", "--ckpt.save-async")
ALONE = ("--launch.max-restarts", "0")
PROBLEMS = (
    "commits_lost",
    "draws_wrong",
    "damaged",
    "digest_differs",
    "replay_differs",
    "survivors",
    "failed",
)


@dataclass(frozen=True)
class Mode:
    """One kind of run, and whom to kill in it."""

    command: str
    flags: tuple[str, ...]
    victims: tuple[str, ...]
    repeats: bool
    """Whether two runs of these settings have equal digests."""


WORKERS = ("trainer", "orchestrator", "inference")
MODES = {
    "sft": Mode("sft", (*SFT, *KEEP, *ALONE), ("launcher", "trainer"), repeats=True),
    "sft_async_save": Mode("sft", (*SFT, *ASYNC, *ALONE), ("launcher", "trainer"), repeats=True),
    "rl": Mode("rl", (*RL, *ASYNC, *ALONE), ("launcher", *WORKERS, "all"), repeats=False),
    "rl_exact": Mode(
        "rl", (*RL, "--deterministic", *KEEP, *ALONE), ("launcher", *WORKERS, "all"), repeats=True
    ),
    "rl_restarts": Mode("rl", (*RL, "--deterministic", *ASYNC), (*WORKERS, "launcher"), repeats=True),
}


class Campaign:
    """Counts of everything so far; kept in a file, so that the campaign can be interrupted."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.done = 0
        self.notes: list[str] = []
        root.mkdir(parents=True, exist_ok=True)
        self._file = root / "campaign.json"
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            self.counts, self.done, self.notes = Counter(saved["counts"]), saved["done"], saved["notes"]

    @property
    def kills(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith("kill/"))

    def save(self) -> None:
        saved = {"counts": dict(sorted(self.counts.items())), "done": self.done, "notes": self.notes}
        self._file.write_text(json.dumps(saved, indent=1))

    def problem(self, what: str, detail: str) -> None:
        self.counts[what] += 1
        self.notes.append(f"scenario {self.done}: {what}: {detail}"[:2000])

    def reference(self, name: str) -> str:
        """The digest of an undisturbed run of a mode."""
        root = self.root / f"calm_{name}"
        if not (root / "finished").exists():
            shutil.rmtree(root, ignore_errors=True)
            code, said = _finish(MODES[name], root)
            if code != 0:
                raise SystemExit(f"an undisturbed run of {name} fails:\n{said}")
            (root / "finished").touch()
        return run_digest(root)

    def scenario(self, kills: int) -> None:
        """One run under fire, to its end."""
        rng = random.Random(f"{self.seed}/{self.done}")
        name = list(MODES)[self.done % len(MODES)]
        mode, root = MODES[name], self.root / f"run_{self.done}"
        shutil.rmtree(root, ignore_errors=True)
        floor = 0
        for _ in range(kills):
            victim = rng.choice(mode.victims)
            if not _start_and_kill(mode, root, victim, rng):
                break
            self.counts[f"kill/{name}/{victim}"] += 1
            _wait_for_none(root, 5.0)
            for pid in processes_of(root):
                self.problem("survivors", f"process {pid} after the {victim} was killed")
            newest = max(durable.committed(RunPaths(root).checkpoints), default=0)
            if newest < floor:
                self.problem("commits_lost", f"checkpoint {floor} was there, {newest} is")
            floor = newest
        code, said = _finish(mode, root)
        if code != 0:
            self.problem("failed", said[-1500:])
        self._judge(name, mode, root)
        self.counts["scenarios"] += 1
        self.done += 1
        self.save()

    def _judge(self, name: str, mode: Mode, root: Path) -> None:
        if mode.repeats and run_digest(root) != self.reference(name):
            self.problem("digest_differs", f"{root} against calm_{name}")
        self._ask("damaged", "ckpt", "verify", root)
        if mode.command == "rl":
            self._ask("draws_wrong", "ckpt", "audit", root)
        if "--ckpt.keep-last" not in mode.flags:
            self._ask("replay_differs", "trainer", "--replay", root)
        if not self.notes:
            shutil.rmtree(root)

    def _ask(self, what: str, command: str, *arguments: object) -> None:
        process = start(command, *arguments)
        said, _ = process.communicate()
        if process.returncode != 0:
            self.problem(what, said[-1500:])


def _start_and_kill(mode: Mode, root: Path, victim: str, rng: random.Random) -> bool:
    """Start, wait for a new step, kill after a random delay; False if the run ended before."""
    before = last_step(root)
    process = start(mode.command, *mode.flags, "--output-dir", root)
    deadline = time.monotonic() + 120
    while last_step(root) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    is_alive = process.poll() is None
    if victim != "launcher":
        for pid in processes_of(root, "" if victim == "all" else victim):
            _kill(pid)
    if victim in ("launcher", "all") or "--launch.max-restarts" in mode.flags:
        if victim in ("launcher", "all"):
            kill(process)
        else:
            process.communicate(timeout=60)
        return is_alive
    # The launcher replaces the victim; it is killed later, at another random instant.
    time.sleep(rng.uniform(0, 6))
    kill(process)
    return is_alive


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _wait_for_none(root: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while processes_of(root) and time.monotonic() < deadline:
        time.sleep(0.02)


def _finish(mode: Mode, root: Path) -> tuple[int, str]:
    process = start(mode.command, *mode.flags, "--output-dir", root)
    said, _ = process.communicate()
    return process.returncode, said


def report(campaign: Campaign) -> str:
    counts = campaign.counts
    lines = [f"{counts['scenarios']} runs, {campaign.kills} kills"]
    lines += [
        f"  {name.removeprefix('kill/'):30} {n}" for name, n in sorted(counts.items()) if "kill/" in name
    ]
    lines += [f"{name:32} {counts[name]}" for name in PROBLEMS]
    return "\n".join([*lines, *campaign.notes])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--root", type=Path, default=Path("outputs/campaign"))
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    campaign = Campaign(arguments.root.resolve(), arguments.seed)
    assert (BIN / "rl").exists(), "run it with `uv run python`"
    while campaign.kills < arguments.kills:
        campaign.scenario(min(arguments.kills_per_run, arguments.kills - campaign.kills))
        sys.stdout.write(f"{campaign.kills} kills, {len(campaign.notes)} problems\n")
        sys.stdout.flush()
    sys.stdout.write(report(campaign) + "\n")
    return 1 if campaign.notes else 0


if __name__ == "__main__":
    sys.exit(main())
