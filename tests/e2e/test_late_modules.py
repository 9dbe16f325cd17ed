"""A module that a reward imports by a name it makes up while it runs: noted before it is used, and held to that."""

import os
import subprocess

import pytest

from programs import BIN, ROOT, run_digest
from ratchet import attempts
from ratchet.audit import audit
from ratchet.paths import RunPaths

REWARD = """
import importlib

def reward(completion, row):
    return importlib.import_module("late" + "_one").share(completion)
"""
LATE = """
def share(completion):
    return sum(c in "aeiou" for c in completion) / max(len(completion), 1)
"""
FLAGS = (
    *("@", "rl.toml", "--max-steps", "3", "--deterministic", "--inference.slots", "16"),
    *("--orchestrator.batch-size", "8", "--orchestrator.group-size", "4", "--ckpt.interval", "1"),
    *("--orchestrator.sampling.max-tokens", "4", "--launch.max-restarts", "0"),
)


def rl(project, *flags, code=0, **extra):
    done = subprocess.run(
        [BIN / "rl", *FLAGS, *flags],
        cwd=project,
        env={**os.environ, "NO_COLOR": "1", **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture
def project(tmp_path):
    subprocess.run([BIN / "ratchet", "init", tmp_path / "project"], cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "project" / "reward.py").write_text(REWARD)
    (tmp_path / "project" / "late_one.py").write_text(LATE)
    return tmp_path / "project"


def notes(root, number):
    return sorted(p.parent.name for p in RunPaths(root).attempt(number).glob("*/inputs.json"))


def test_a_late_module_is_noted_before_it_is_used_and_held_to_that(project):
    calm, root = project / "outputs" / "calm", project / "outputs" / "run"
    rl(project, "--output-dir", calm)
    assert notes(calm, 1) == ["orchestrator"]

    said = rl(project, "--output-dir", root, code=1, RATCHET_CRASH_AT="replace.inputs.json.before_rename:1")
    assert "The orchestrator was killed by signal 9" in said
    assert notes(root, 1) == []
    assert not list(RunPaths(root).journal.iterdir())
    rl(project, "--output-dir", root, code=1, RATCHET_CRASH_AT="batch.committed:2")
    assert "env.late" not in attempts.newest(RunPaths(root)).inputs.groups
    assert notes(root, 2) == ["orchestrator"]

    (project / "late_one.py").write_text(LATE + "# a word\n")
    said = rl(project, "--output-dir", root, code=2)
    assert "env.late (late_one.py" in said
    (project / "late_one.py").write_text(LATE)
    rl(project, "--output-dir", root)
    assert run_digest(root) == run_digest(calm)
    assert audit(RunPaths(root)).findings == []
