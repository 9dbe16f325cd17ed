"""The kill campaign: the real programs, killed at random instants until a number of kills is reached.

    uv run python tests/campaign/kills.py --kills 300 --root outputs/campaign

A scenario is one run in one mode. It is started, and a victim is killed with SIGKILL at a random instant: mostly
after new progress, sometimes while it starts. Now and then the next command rolls the run back, and is killed too.
The last start runs to its end; then everything is compared with a run of the same settings that nobody disturbed.
The same command continues an interrupted campaign. `--jobs` plays several scenarios at a time, each on two cores.

It prints kills by victim and by phase, what was committed and resumed, and counts of what must be zero: commits
lost, draws lost or doubled, damaged directories, differing digests, replays that differ, processes that outlived
their launcher, runs that failed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import BIN, TINY_SFT, kill, last_step, processes_of, start, wait_until
from ratchet import attempts, digest, durable, ledger
from ratchet.errors import Damaged
from ratchet.paths import RunPaths

RL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--max-steps", "16"),
)
KEEP = ("--ckpt.interval", "2", "--ckpt.keep-last", "2")
ASYNC = ("--ckpt.interval", "3", "--ckpt.save-async")
BOTH = ("--ckpt.interval", "2", "--ckpt.keep-last", "2", "--ckpt.save-async")
ALONE = ("--launch.max-restarts", "0")
BY_MEMORY = ("--weights.transport", "memory", "--weights.publish-interval", "3")
TWO_RANKS = ("--trainer.nproc", "2")
PROBLEMS = (
    "commits_lost",
    "draws_lost_or_doubled",
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
    repeats: bool = True
    """Whether two runs of these settings have equal digests."""

    @property
    def restarts_roles(self) -> bool:
        return ALONE[0] not in self.flags


PROGRAMS = ("trainer", "orchestrator", "inference")
ANYONE = ("launcher", *PROGRAMS, "all")
MODES = {
    "sft": Mode("sft", (*TINY_SFT, *KEEP, *ALONE), ("launcher", "trainer")),
    "sft_async_save_2_ranks": Mode("sft", (*TINY_SFT, *BOTH, *TWO_RANKS, *ALONE), ("launcher", "trainer")),
    "rl": Mode("rl", (*RL, *ASYNC, *ALONE), ANYONE, repeats=False),
    "rl_exact": Mode("rl", (*RL, "--deterministic", *KEEP, *ALONE), ANYONE),
    "rl_restarts": Mode("rl", (*RL, "--deterministic", *ASYNC), (*PROGRAMS, "nursery", "launcher")),
    "rl_exact_memory": Mode("rl", (*RL, "--deterministic", *BOTH, *BY_MEMORY, *ALONE), ANYONE),
    "rl_exact_2_ranks": Mode("rl", (*RL, "--deterministic", *BOTH, *TWO_RANKS, *ALONE), ANYONE),
    "rl_restarts_memory": Mode(
        "rl", (*RL, "--deterministic", *ASYNC, *BY_MEMORY), (*PROGRAMS, "nursery", "launcher")
    ),
    "rl_2_ranks_restarts": Mode(
        "rl", (*RL, *KEEP, *TWO_RANKS), (*PROGRAMS, "nursery", "launcher"), repeats=False
    ),
}


class Campaign:
    """Counts of everything so far; kept in a file, so that the campaign can be interrupted."""

    def __init__(self, root: Path, seed: int, modes: list[str]) -> None:
        self.root = root
        self.seed = seed
        self.modes = modes
        self.counts: Counter[str] = Counter()
        self.finished: set[int] = set()
        self.notes: list[str] = []
        root.mkdir(parents=True, exist_ok=True)
        self._file = root / "campaign.json"
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            self.counts, self.notes = Counter(saved["counts"]), saved["notes"]
            self.finished = set(saved["finished"])
        self._begun = set(self.finished)
        self._promised: dict[int, int] = {}
        self._lock = threading.Lock()
        self._calm = {name: threading.Lock() for name in modes}

    @property
    def kills(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith("kill/"))

    def next(self, target: int, most: int) -> tuple[int, int] | None:
        """The number of a scenario that nobody has begun, and its kills; None if those under way may be enough."""
        with self._lock:
            kills = min(most, target - self.kills - sum(self._promised.values()))
            if kills <= 0:
                return None
            number = next(n for n in range(len(self._begun) + 1) if n not in self._begun)
            self._begun.add(number)
            self._promised[number] = kills
            return number, kills

    def add(self, number: int, counts: Counter[str], notes: list[str]) -> None:
        """Keep what a scenario has shown."""
        with self._lock:
            self.counts += counts
            self.notes += notes
            self.finished.add(number)
            del self._promised[number]
            saved = {"counts": dict(sorted(self.counts.items())), "notes": self.notes}
            self._file.write_text(json.dumps(saved | {"finished": sorted(self.finished)}, indent=1))
            sys.stdout.write(f"{self.kills} kills, {len(self.notes)} problems\n")
            sys.stdout.flush()

    def reference(self, name: str) -> dict[str, str]:
        """What an undisturbed run of a mode comes to, by part."""
        root = self.root / f"calm_{name}"
        with self._calm[name]:
            if not (root / "finished").exists():
                shutil.rmtree(root, ignore_errors=True)
                code, said = Scenario(MODES[name], root).finish()
                if code != 0:
                    raise SystemExit(f"an undisturbed run of {name} fails:\n{said}")
                (root / "finished").touch()
        return digest.result(root)


class Trial:
    """One run under fire, to its end, and what is said of it."""

    def __init__(self, campaign: Campaign, number: int) -> None:
        self._campaign = campaign
        self.number = number
        self.name = campaign.modes[number % len(campaign.modes)]
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []

    def problem(self, what: str, detail: str) -> None:
        self.counts[what] += 1
        self.notes.append(f"scenario {self.number}: {what}: {detail}"[:2000])

    def play(self, kills: int) -> None:
        rng = random.Random(f"{self._campaign.seed}/{self.number}")
        scenario = Scenario(MODES[self.name], self._campaign.root / f"run_{self.number}")
        shutil.rmtree(scenario.root, ignore_errors=True)
        floor = 0
        for _ in range(kills):
            if rng.random() < 0.2 and (step := scenario.roll_back(rng)) is not None:
                floor = step
            victim = rng.choice(scenario.mode.victims)
            if not scenario.start_and_kill(victim, rng):
                break
            self.counts[f"kill/{self.name}/{victim}"] += 1
            self.counts[f"phase/{scenario.phase()}"] += 1
            scenario.wait_for_none(5.0)
            for pid in processes_of(scenario.root):
                self.problem("survivors", f"process {pid} after the {victim} was killed")
            newest = max(durable.committed(scenario.paths.checkpoints), default=0)
            if newest < floor:
                self.problem("commits_lost", f"checkpoint {floor} was there, {newest} is")
            floor = floor if scenario.owes_rollback() else newest
        code, said = scenario.finish()
        if code != 0:
            self.problem("failed", said[-1500:])
        self._judge(scenario)
        self.counts["runs"] += 1

    def _judge(self, scenario: "Scenario") -> None:
        mode, root = scenario.mode, scenario.root
        self.counts.update(scenario.tally())
        if mode.repeats and (parts := self._differing(root)):
            self.problem("digest_differs", f"{root} against calm_{self.name}: {', '.join(parts)}")
        self._ask("damaged", "ckpt", "verify", root)
        if mode.command == "rl":
            self._ask("draws_lost_or_doubled", "ckpt", "audit", root)
        self._ask("replay_differs", "trainer", "--replay", root)
        if not self.notes:
            shutil.rmtree(root)

    def _differing(self, root: Path) -> list[str]:
        """The parts of a run that are not those of the undisturbed one."""
        expected, found = self._campaign.reference(self.name), digest.result(root)
        parts = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        return [
            f"{name} from batch {self._first_other_line(root)} on" if name == "ledger" else name
            for name in parts
        ]

    def _first_other_line(self, root: Path) -> int:
        calm = self._campaign.root / f"calm_{self.name}"
        mine, others = (ledger.raw_lines(RunPaths(one).ledger) for one in (root, calm))
        return next(
            (i for i, pair in enumerate(zip(mine, others, strict=False)) if pair[0] != pair[1]), len(mine)
        )

    def _ask(self, what: str, command: str, *arguments: object) -> None:
        process = start(command, *arguments)
        said, _ = process.communicate()
        if process.returncode != 0:
            self.problem(what, said[-1500:])


@dataclass
class Scenario:
    """One run of a mode, and the command that continues it."""

    mode: Mode
    root: Path
    more: tuple[str, ...] = field(default=())
    """What the command carries since the last rollback."""

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.root)

    def _start(self) -> "subprocess.Popen[str]":
        return start(self.mode.command, *self.mode.flags, *self.more, "--output-dir", self.root)

    def finish(self) -> tuple[int, str]:
        process = self._start()
        said, _ = process.communicate()
        return process.returncode, said

    def roll_back(self, rng: random.Random) -> int | None:
        """Let the next command roll back to a checkpoint; returns it, or None where there is none but the newest."""
        steps = list(durable.committed(self.paths.checkpoints))[:-1]
        if not steps:
            return None
        step = rng.choice(steps)
        if self.more[1:] == (str(step),):
            return None  # the same command again would continue
        self.more = ("--ckpt.resume-step", str(step))
        return step

    def owes_rollback(self) -> bool:
        """Whether the next start will roll back: the command that asks for it died before it was recorded."""
        record = self._record()
        asked = int(self.more[1]) if self.more else None
        return record is None or record.resume_step != asked

    def start_and_kill(self, victim: str, rng: random.Random) -> bool:
        """Start, wait for new progress or a moment of the start, kill; False if the run ended before."""
        before = last_step(self.root)
        process = self._start()
        if before and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 6))
        else:
            self._wait_for_progress(process, before)
            time.sleep(rng.uniform(0, 0.5))
        is_alive = process.poll() is None
        if victim in ("launcher", "all"):
            if victim == "all":
                self._kill("", rng)
            kill(process)
            return is_alive
        wait_until(lambda: processes_of(self.root, victim) or process.poll() is not None)
        self._kill(victim, rng)
        if self.mode.restarts_roles:
            # The launcher replaces the victim; it is killed later, at another random instant.
            time.sleep(rng.uniform(0, 6))
            kill(process)
        else:
            process.communicate()
        return is_alive

    def _wait_for_progress(self, process: "subprocess.Popen[str]", before: int) -> None:
        """A new step, counted anew where the start rolls back."""
        attempt, deadline = max(attempts.numbers(self.paths), default=0), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            record = self._record()
            begun = record is not None and record.attempt > attempt and record.applied
            if begun and last_step(self.root) > record.plan.step:
                return
            time.sleep(0.01)

    def _record(self) -> attempts.Record | None:
        try:
            return attempts.newest(self.paths)
        except Damaged:
            return None  # it is being written

    def _kill(self, role: str, rng: random.Random) -> None:
        """All processes of the run, or one of those of a role."""
        found = processes_of(self.root, role)
        for pid in found if not role else rng.sample(found, min(1, len(found))):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def phase(self) -> str:
        """What the newest attempt was doing here, by its plan."""
        record = self._record()
        if record is None:
            return "fresh"
        if record.plan.rollback:
            return "rollback"
        if record.plan.next_batch > record.plan.step:
            return "replay"
        return "resume" if record.plan.from_checkpoint else "fresh"

    def tally(self) -> Counter[str]:
        """What all attempts did: resumes, rollbacks, restarts of a role, checkpoints."""
        found: Counter[str] = Counter()
        for number in attempts.numbers(self.paths):
            record = attempts.read(self.paths, number)
            found["attempts"] += 1
            found["resumes"] += record.plan.from_checkpoint
            found["rollbacks"] += record.plan.rollback
            found["restarts_of_a_role"] += len(record.restarts)
            log = self.paths.attempt(number) / "trainer.log"
            saved = re.findall(r"checkpoint \d+, the loop waited", log.read_text()) if log.exists() else []
            found["checkpoints"] += len(saved)
        return found

    def wait_for_none(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while processes_of(self.root) and time.monotonic() < deadline:
            time.sleep(0.02)


def report(campaign: Campaign) -> str:
    counts = campaign.counts
    lines = [f"{counts['runs']} runs, {campaign.kills} kills"]
    victims: Counter[str] = Counter()
    for name, n in counts.items():
        if name.startswith("kill/"):
            victims[name.rpartition("/")[2]] += n
    lines.append("by victim    " + _listed(victims))
    modes: Counter[str] = Counter()
    for name, n in counts.items():
        if name.startswith("kill/"):
            modes[name.split("/")[1]] += n
    lines.append("by mode      " + _listed(modes))
    phases = {name.partition("/")[2]: n for name, n in counts.items() if name.startswith("phase/")}
    lines.append("by phase     " + _listed(Counter(phases)))
    done = ("attempts", "resumes", "rollbacks", "restarts_of_a_role", "checkpoints")
    lines.append("done         " + _listed(Counter({name: counts[name] for name in done})))
    lines += [f"{name:24} {counts[name]}" for name in PROBLEMS]
    return "\n".join([*lines, *campaign.notes])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--root", type=Path, default=Path("outputs/campaign"))
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    campaign = Campaign(arguments.root.resolve(), arguments.seed, arguments.modes)
    assert (BIN / "rl").exists(), "run it with `uv run python`"

    def play() -> None:
        while (found := campaign.next(arguments.kills, arguments.kills_per_run)) is not None:
            trial = Trial(campaign, found[0])
            trial.play(found[1])
            campaign.add(trial.number, trial.counts, trial.notes)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for worker in [pool.submit(play) for _ in range(arguments.jobs)]:
            worker.result()
    sys.stdout.write(report(campaign) + "\n")
    return 1 if campaign.notes else 0


if __name__ == "__main__":
    sys.exit(main())
