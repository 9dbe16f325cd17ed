"""One program of a run dies or freezes: it alone is replaced, and the run ends as if nothing had happened."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from programs import TINY_SFT, environment, last_step, processes_of, rows, run, run_digest, start, wait_until
from ratchet import attempts, metrics, resume
from ratchet.attempts import token
from ratchet.cli.programs import check_sft
from ratchet.config import SFTConfig
from ratchet.config_io import load
from ratchet.errors import EXIT_FENCED
from ratchet.launch.opening import open_attempt
from ratchet.paths import RunPaths
from ratchet.stage import Stage

SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "8"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.eval.interval", "4", "--ckpt.interval", "3"),
)
SFT = (*TINY_SFT, "--max-steps", "6")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run in which nothing happens."""
    root = tmp_path_factory.mktemp("calm") / "run"
    run("rl", *SMALL, "--output-dir", root)
    return root


@pytest.fixture(scope="module")
def calm_sft(tmp_path_factory):
    root = tmp_path_factory.mktemp("calm_sft") / "run"
    run("sft", *SFT, "--output-dir", root, "--ckpt.interval", "2")
    return root


def record(root):
    """The newest attempt's record; reading it checks its hash."""
    return attempts.newest(RunPaths(root))


def restarted(root):
    return [restart.role for restart in record(root).restarts]


def victim(root, role, process):
    """The one process of a role, once it works: it has a workshop with a heartbeat in it."""
    workshops = RunPaths(root).staging
    wait_until(lambda: list(workshops.glob(f"*.{role}.*/heartbeat")), process=process)
    (found,) = processes_of(root, role)
    return found


def test_each_program_is_replaced_alone_and_the_run_ends_the_same(calm, tmp_path):
    rng, root = random.Random(3), tmp_path / "run"
    process = start("rl", *SMALL, "--output-dir", root)
    for count, role in enumerate(("inference", "orchestrator", "trainer"), start=1):
        others = ({"inference", "orchestrator", "trainer"} - {role}) if count > 1 else set()
        wait_until(lambda count=count: last_step(root) >= count, process=process)
        time.sleep(rng.uniform(0, 0.2))
        before = {other: processes_of(root, other) for other in others}
        os.kill(victim(root, role, process), signal.SIGKILL)
        wait_until(lambda count=count: len(restarted(root)) == count, process=process)
        assert {other: processes_of(root, other) for other in others} == before
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert restarted(root) == ["inference", "orchestrator", "trainer"]
    assert len(re.findall(r"was killed by signal 9: incarnation 2", output)) == 3
    assert "restarts: inference 1, orchestrator 1, trainer 1" in output
    assert run_digest(root) == run_digest(calm)
    assert not processes_of(root)
    assert not os.listdir(root / "staging")


@pytest.mark.slow
def test_a_frozen_program_is_replaced(calm, tmp_path):
    root = tmp_path / "run"
    process = start("rl", *SMALL, "--output-dir", root, "--launch.frozen-s", "3")
    for role, step in (("orchestrator", 2), ("inference", 4)):
        wait_until(lambda step=step: last_step(root) >= step, process=process)
        os.kill(victim(root, role, process), signal.SIGSTOP)
        wait_until(lambda role=role: role in restarted(root), process=process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "The orchestrator gave no sign of life" in output
    assert "The inference gave no sign of life" in output
    assert run_digest(root) == run_digest(calm)


@pytest.mark.slow
def test_a_program_that_always_dies_stops_the_run_with_the_reason(tmp_path):
    flags = ("--ckpt.interval", "2", "--launch.max-restarts", "1")
    said = run("sft", *SFT, *flags, "--output-dir", tmp_path, code=1, RATCHET_CRASH_AT="weights.committed:1")
    assert "incarnation 2 continues at step 0" in said
    assert "trainer was killed by signal 9; it was started again 1 time within 600 s" in said
    assert restarted(tmp_path) == ["trainer"]
    assert record(tmp_path).outcome.code == 1


@pytest.mark.slow
def test_a_trainer_without_a_checkpoint_cannot_be_replaced_alone(tmp_path):
    flags = [flag for flag in SMALL if flag not in ("--ckpt.interval", "3")]
    process = start("rl", *flags, "--output-dir", tmp_path)
    wait_until(lambda: last_step(tmp_path) >= 4, process=process)
    os.kill(victim(tmp_path, "trainer", process), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "it cannot continue alone: No checkpoint was made and the first batches are gone" in output


@pytest.mark.campaign
def test_an_sft_trainer_is_replaced_inside_a_save(calm_sft, tmp_path):
    root = tmp_path / "run"
    process = start("sft", *SFT, "--output-dir", root, "--ckpt.interval", "2")
    wait_until(lambda: list(RunPaths(root).staging.glob("*.trainer.1/*-checkpoint_4")), process=process)
    os.kill(victim(root, "trainer", process), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert restarted(root) == ["trainer"]
    assert record(root).restarts[0].plan.step in (2, 4)
    assert run_digest(root) == run_digest(calm_sft)
    assert [row["step"] for row in rows(root)] == [1, 2, 3, 4, 5, 6]


def spawn(stage, incarnation):
    """A trainer of attempt 1 without a launcher that would end it."""
    Stage.open(stage.paths, token(1, "trainer", incarnation))
    command = [sys.executable, "-m", "ratchet.trainer", str(stage.paths.root), "1", str(incarnation)]
    return subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS=1), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def everything(root):
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name != "lock"}


@pytest.mark.slow
def test_a_replaced_trainer_that_wakes_up_inside_a_save_publishes_nothing_and_exits(calm_sft, tmp_path):
    config = load(SFTConfig, [*SFT, "--output-dir", str(tmp_path / "run"), "--ckpt.interval", "2"])
    opened = open_attempt("sft", config, lambda seen: check_sft(config, seen))
    root, stage = opened.paths.root, opened.stage
    old = spawn(stage, 1)
    wait_until(lambda: list(opened.paths.staging.glob("001.trainer.1/*-checkpoint_4")))
    old.send_signal(signal.SIGSTOP)
    stage.revoke("001.trainer.")
    plan = resume.decide_trainer(opened.paths, "sft")
    restart = attempts.Restart(role="trainer", incarnation=2, reason="frozen", plan=plan)
    attempts.write(stage, msgspec.structs.replace(opened.record, restarts=(restart,)))
    metrics.rewind(stage, opened.paths.metric("trainer"), plan.step)
    new = spawn(stage, 2)
    wait_until(lambda: last_step(root) > plan.step or new.poll() is not None)
    old.send_signal(signal.SIGCONT)
    _, said = old.communicate(timeout=30)
    assert old.returncode == EXIT_FENCED, said.decode()
    _, said = new.communicate(timeout=60)
    assert new.returncode == 0, said.decode()
    opened.close(0, "complete")
    assert run_digest(root) == run_digest(calm_sft)
    assert [row["step"] for row in rows(root)] == [1, 2, 3, 4, 5, 6]
