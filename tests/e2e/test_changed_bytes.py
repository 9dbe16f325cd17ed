"""One byte of one input changes between two attempts: the start is refused, or the run ends as if nothing had changed.

    uv run pytest tests/e2e/test_changed_bytes.py -m campaign      200 changes

The control arm compares nothing, and must let changes through that end in another digest.
"""

import random
import shutil
import subprocess
import sys

import pytest
from given import RL, flip, make_model, make_project

from programs import ROOT, environment, run_digest, start

SFT = (
    *("sft", "@", "examples/reverse_text/sft.toml", "--data.batch-size", "4", "--trainer.threads", "1"),
    *(
        "--max-steps",
        "2",
        "--ckpt.interval",
        "1",
        "--launch.max-restarts",
        "0",
        "--model.random-init",
        "false",
    ),
)
MODEL = (
    *(
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
    ),
    *("model/chat_template.jinja", "model/model.safetensors.index.json"),
    *("model/model-00001-of-00002.safetensors", "model/model-00002-of-00002.safetensors"),
)
CODE = ("reward.py", "helper.py", "later.py", "units.json", "tasks.jsonl", "eval.jsonl")
UNCOMPARED = """
import sys
from ratchet.inputs import seen, tree
tree.reconcile = seen.reconcile = lambda known, found, **_: tree.inputs({**known.groups, **found}, known.accepted)
from ratchet.cli import programs
sys.argv = ["sft", *sys.argv[1:]]
programs.sft()
"""


class Arm:
    """A stopped run with all that it was given, and the digest to which it goes on."""

    def __init__(self, where, kind):
        self.where, self.kind = where, kind
        if kind == "rl":
            make_project(where)
            shutil.rmtree(where / "model")
        else:
            where.mkdir()
            lines = (ROOT / "examples/reverse_text/sft.jsonl").read_text().splitlines(keepends=True)[:8]
            (where / "rows.jsonl").write_text("".join(lines))
        make_model(where / "model")
        self.files = (*MODEL, *CODE) if kind == "rl" else (*MODEL, "rows.jsonl")
        code, said = self.run(where, crash_at="checkpoint.before_rename:1")
        assert code == 1, said
        shutil.copytree(where, where.parent / f"{kind}_calm")
        code, said = self.run(where.parent / f"{kind}_calm")
        assert code == 0, said
        self.digest = run_digest(where.parent / f"{kind}_calm" / "run")

    def command(self, where):
        if self.kind == "rl":
            return where, (*RL, "--model.random-init", "false", "--output-dir", "run")
        flags = ("--model.name", where / "model", "--data.name", where / "rows.jsonl")
        return ROOT, (*SFT, *flags, "--output-dir", where / "run")

    def run(self, where, crash_at=None, program=None):
        """The same command for a copy of the run; its exit code and what it said."""
        folder, flags = self.command(where)
        extra = {} if crash_at is None else {"RATCHET_CRASH_AT": crash_at}
        if program is None:
            process = start(*flags, cwd=folder, **extra)
        else:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *map(str, flags[1:])],
                cwd=folder,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        said, _ = process.communicate(timeout=240)
        return process.returncode, said

    def try_one(self, draw, folder, program=None):
        """Change one byte of a copy and continue; whether it was refused, or ended as the undisturbed run."""
        shutil.copytree(self.where, folder)
        name = draw.choice(self.files)
        path = folder / name
        at, mask = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        flip(path, at, mask)
        code, said = self.run(folder, program=program)
        assert "Traceback" not in said or program is not None, f"{name}, byte {at}, mask {mask}:\n{said}"
        outcome = "refused" if code == 2 else "other"
        if code == 0 and run_digest(folder / "run") == self.digest:
            outcome = "same"
        shutil.rmtree(folder)
        return f"{name}, byte {at}, mask {mask}", outcome, said


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    made = {}

    def arm(kind):
        if kind not in made:
            made[kind] = Arm(root / kind, kind)
        return made[kind]

    return arm


def fuzz(arms, tmp_path, kind, seed, count):
    draw, bad = random.Random(seed), []
    for number in range(count):
        what, outcome, said = arms(kind).try_one(draw, tmp_path / str(number))
        if outcome == "other":
            bad.append(f"{what}:\n{said}")
    assert not bad, f"{len(bad)} of {count}: {bad[0]}"


def test_a_changed_byte_is_refused_or_makes_no_difference_in_sft(arms, tmp_path):
    fuzz(arms, tmp_path, "sft", seed=1, count=5)


def test_a_changed_byte_is_refused_or_makes_no_difference_in_rl(arms, tmp_path):
    fuzz(arms, tmp_path, "rl", seed=2, count=5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_more_of_them(arms, tmp_path, kind):
    fuzz(arms, tmp_path, kind, seed=3, count=12)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_a_hundred_of_each(arms, tmp_path, kind):
    fuzz(arms, tmp_path, kind, seed=4, count=100)


def test_where_nothing_is_compared_changes_come_through(arms, tmp_path):
    """The control arm, by the process of the launcher; the trainer's own check is what then refuses, or nothing."""
    arm, draw = arms("sft"), random.Random(5)
    arm.files = ("rows.jsonl",)
    found = [arm.try_one(draw, tmp_path / str(number), program=UNCOMPARED) for number in range(3)]
    arm.files = (*MODEL, "rows.jsonl")
    assert any(outcome == "other" for _, outcome, _ in found), found
