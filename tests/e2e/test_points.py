"""The real programs die at their durable points: one of each role in each phase of one run, which still ends the same.

Every point with a model of one integer instead: tests/crash/test_crash_matrix.py.
"""

import shutil

import pytest

from programs import run, run_digest, start
from ratchet import attempts
from ratchet.audit import audit
from ratchet.paths import RunPaths

RL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "12"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.eval.interval", "6", "--ckpt.interval", "2", "--launch.max-restarts", "0"),
)
CONTINUED = {("continued", "resume"), ("continued", "replay")}
BACK = ("--ckpt.resume-step", "2")

# Who dies, where, and in what phase: each line continues what the one before it left. "continued" is a resume with or
# without a log to replay: how far the orchestrator is ahead when a trainer dies is a matter of moments.
FORWARD = (
    ("launcher", "replace.record.json.before_rename:1", "fresh"),
    ("orchestrator", "batch.after_rename:2", "fresh"),
    ("trainer", "checkpoint.after_shards:1", "replay"),
    ("orchestrator", "journal.after_append:4", "replay"),
    ("trainer", "weights.before_rename:2", "continued"),
    ("orchestrator", "eval.before_rename:1", "replay"),
    ("trainer", "checkpoint.committed:1", "continued"),
    ("launcher", "replace.record.json.before_rename:2", "continued"),
)
BACKWARD = (
    ("launcher", "rollback.moved:3", "rollback"),
    ("orchestrator", "batch.before_rename:1", "continued"),
    ("trainer", "checkpoint.before_rename:1", "continued"),
    ("orchestrator", "eval.committed:1", "continued"),
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    root = tmp_path_factory.mktemp("calm") / "run"
    run("rl", *RL, "--output-dir", root)
    return root


def phase(root):
    plan = attempts.newest(RunPaths(root)).plan
    if plan.rollback:
        return "rollback"
    if plan.next_batch > plan.step:
        return "replay"
    return "resume" if plan.step else "fresh"


def die(root, flags, role, point, expected):
    process = start("rl", *RL, *flags, "--output-dir", root, RATCHET_CRASH_AT=point)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode == -9) == (role == "launcher"), said
    assert role == "launcher" or f"The {role} was killed by signal 9" in said
    if attempts.newest(RunPaths(root)) is not None:
        assert phase(root) == expected or (expected, phase(root)) in CONTINUED, f"{point}: {said}"


def finish(root, flags, calm):
    run("rl", *RL, *flags, "--output-dir", root)
    assert run_digest(root) == run_digest(calm)
    assert audit(RunPaths(root)).findings == []


@pytest.mark.campaign
def test_a_death_of_each_role_on_the_way_forward_changes_nothing(calm, tmp_path):
    root = tmp_path / "run"
    for role, point, expected in FORWARD:
        die(root, (), role, point, expected)
    finish(root, (), calm)


@pytest.mark.campaign
def test_a_death_of_each_role_on_the_way_back_changes_nothing(calm, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(calm, root)
    for role, point, expected in BACKWARD:
        die(root, BACK, role, point, expected)
    finish(root, BACK, calm)
