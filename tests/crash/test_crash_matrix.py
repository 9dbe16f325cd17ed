"""Every durable point of the code, in every phase of a run: die there, run the same command, compare with a run
that was never interrupted."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ratchet import digest, durable, journal, metrics
from ratchet.audit import audit
from ratchet.paths import RunPaths

TOY = Path(__file__).with_name("toy.py")
SOURCE = Path(__file__).parents[2] / "src" / "ratchet"
STEPS = 7
FLAGS = ("--ckpt.interval", "2", "--ckpt.keep-last", "2")

# Each named point, with the occurrences at which the toy dies. Kinds are those the toy publishes.
KINDS = ("batch", "weights", "checkpoint")
COMMIT = ("before_manifest", "before_rename", "after_rename", "committed")
POINTS = {
    **{f"{kind}.{place}": (1, 3, 4) for kind in KINDS for place in COMMIT},
    "remove.after_rename": (1, 2, 5),
    "replace.record.json.before_rename": (1, 2, 3),
    "replace.run.toml.before_rename": (1, 2),
    "create.before_rename": (1, 3),
    "journal.before_append": (1, 2, 5),
    "journal.after_append": (1, 2, 5),
    "journal.before_trim": (1, 2),
    "toy.before_row": (1, 4),
    "toy.before_line": (1, 4),
}
# Reached only by a rollback, tested below.
ROLLBACK_POINTS = {
    "rollback.moved": (1, 2, 5),
    "replace.record.json.before_rename": (1, 2),
    "replace.trainer.jsonl.before_rename": (1,),
    "replace.orchestrator.jsonl.before_rename": (1,),
    "replace.ledger.jsonl.before_rename": (1, 2),
    "batch.committed": (1,),
    "checkpoint.before_rename": (1,),
}
# The toy has neither shards nor evaluations: the real programs die there in tests/e2e.
ELSEWHERE = {"checkpoint.before_shards", "checkpoint.after_shards"}


def run(root, *flags, steps=STEPS, crash_at=""):
    return subprocess.run(
        [sys.executable, str(TOY), str(root), str(steps), *flags],
        env={**os.environ, "RATCHET_CRASH_AT": crash_at},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def finish(root, *flags, steps=STEPS):
    done = run(root, *flags, steps=steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert audit(RunPaths(root)).findings == []
    return done.stdout


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The digest of a run that nobody interrupted."""
    root = tmp_path_factory.mktemp("reference") / "run"
    finish(root, *FLAGS)
    return digest.parts(root)


@pytest.mark.parametrize(("point", "count"), [(p, n) for p, counts in POINTS.items() for n in counts])
def test_killed_at_a_durable_point_the_run_ends_the_same(tmp_path, reference, point, count):
    root = tmp_path / "run"
    first = run(root, *FLAGS, crash_at=f"{point}:{count}")
    assert first.returncode == -signal.SIGKILL, f"{point}:{count} was never reached: {first.stderr}"
    newest = max(durable.committed(RunPaths(root).checkpoints), default=0)
    said = finish(root, *FLAGS)
    if newest:
        assert f"step {newest}" in said, "it did not continue at the newest commit"
    assert digest.parts(root) == reference


def generated(root):
    return [int(line) for line in root.with_name(f"{root.name}.generated").read_text().split()]


JOURNAL_POINTS = (
    "journal.before_append",
    "journal.after_append",
    "journal.before_trim",
    "create.before_rename",
)


@pytest.mark.parametrize("point", JOURNAL_POINTS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_finished_rollout_is_never_generated_again(tmp_path, reference, point, count):
    root = tmp_path / "run"
    lost = []
    for times in (count, 1):
        assert run(root, *FLAGS, crash_at=f"{point}:{times}").returncode == -signal.SIGKILL
        if point in ("journal.before_append", "create.before_rename"):
            lost.append(generated(root)[-1])  # finished a moment before, and nowhere yet
    finish(root, *FLAGS)
    assert sorted(generated(root)) == sorted([*range(STEPS + 3), *lost])
    assert digest.parts(root) == reference


def test_a_damaged_journal_is_refused_before_the_start_and_can_be_moved_aside(tmp_path):
    root, keep_all = tmp_path / "run", ("--ckpt.interval", "2")
    run(root, *keep_all, crash_at="batch.committed:4")
    path = journal.segments(RunPaths(root))[0]
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    before = generated(root)
    refused = run(root, *keep_all)
    assert refused.returncode == 2
    assert f"{path} is damaged at byte" in refused.stderr
    assert path.exists()
    said = finish(root, *keep_all, "--ckpt.resume-step", "-1", "--ckpt.on-corrupt", "fallback")
    assert "its rollouts are sampled again" in said
    assert [p.read_bytes() for p in root.glob(f"superseded/*/journal/{path.name}")] == [data]
    assert len(generated(root)) > len(set(generated(root))) >= len(before)
    finish(tmp_path / "whole", *keep_all)
    assert digest.parts(root) == digest.parts(tmp_path / "whole")


@pytest.mark.parametrize("point", sorted(POINTS))
def test_killed_again_while_resuming_the_run_ends_the_same(tmp_path, reference, point):
    root = tmp_path / "run"
    assert run(root, *FLAGS, crash_at="batch.committed:5").returncode == -signal.SIGKILL
    assert run(root, *FLAGS, crash_at=f"{point}:1").returncode == -signal.SIGKILL
    finish(root, *FLAGS)
    assert digest.parts(root) == reference


@pytest.mark.parametrize(
    ("point", "count"), [(p, n) for p, counts in ROLLBACK_POINTS.items() for n in counts]
)
def test_killed_inside_a_rollback_the_same_command_finishes_it(tmp_path, reference, point, count):
    root = tmp_path / "run"
    keep_all = ("--ckpt.interval", "2")
    finish(root, *keep_all)
    back = (*keep_all, "--ckpt.resume-step", "2")
    first = run(root, *back, crash_at=f"{point}:{count}")
    assert first.returncode == -signal.SIGKILL, f"{point}:{count} was never reached: {first.stderr}"
    finish(root, *back)
    whole = tmp_path / "whole"
    finish(whole, *keep_all)
    assert digest.parts(root) == digest.parts(whole)
    (aside,) = root.glob("superseded/*/metrics/trainer.jsonl")
    assert list(root.glob("superseded/*/journal/*.log"))
    moved = metrics.read(aside)
    assert [row["step"] for row in moved] == [3, 4, 5, 6, 7]


def test_two_rollbacks_in_a_row_end_the_same(tmp_path):
    keep_all = ("--ckpt.interval", "2")
    root, whole = tmp_path / "run", tmp_path / "whole"
    finish(root, *keep_all)
    run(root, *keep_all, "--ckpt.resume-step", "4", crash_at="checkpoint.committed:1")
    finish(root, *keep_all, "--ckpt.resume-step", "2")
    finish(whole, *keep_all)
    assert digest.parts(root) == digest.parts(whole)


def test_an_extended_run_equals_a_long_one(tmp_path):
    keep_all = ("--ckpt.interval", "2")
    root, whole = tmp_path / "run", tmp_path / "whole"
    finish(root, *keep_all, steps=4)
    finish(root, *keep_all, "--ckpt.resume-step", "4", steps=8)
    finish(whole, *keep_all, steps=8)
    assert digest.parts(root) == digest.parts(whole)


def test_without_checkpoints_an_interrupted_run_starts_again_aloud(tmp_path):
    root, whole = tmp_path / "run", tmp_path / "whole"
    assert run(root, crash_at="weights.committed:4").returncode == -signal.SIGKILL
    assert "starting again at step 0" in finish(root)
    finish(whole)
    assert digest.parts(root)["metrics/trainer"] == digest.parts(whole)["metrics/trainer"]


def test_every_durable_point_in_the_code_has_a_row():
    """A new point without a test fails here."""
    named = set()
    for path in SOURCE.rglob("*.py"):
        named |= set(re.findall(r'crash_point\(f?"([^"]+)"\)', path.read_text()))
    expanded = set()
    for name in named:
        if name.startswith("{point}"):
            expanded |= {name.replace("{point}", kind) for kind in KINDS}
        elif "{path.name}" in name:
            expanded |= {name.replace("{path.name}", f) for f in ("record.json", "run.toml")}
        else:
            expanded.add(name)
    assert expanded - {*POINTS, *ROLLBACK_POINTS, *ELSEWHERE} == set()
