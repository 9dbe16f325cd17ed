"""Three real servers of one run, killed and frozen again and again: no rollout is lost, and the run ends the same."""

import os
import random
import signal
from pathlib import Path

import pytest

from programs import last_step, processes_of, run, run_digest, start, wait_until
from ratchet import attempts, batchlog, metrics
from ratchet.paths import RunPaths

SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--ckpt.interval", "4"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
)
POOL = (
    *(
        "--inference.replicas",
        "3",
        "--orchestrator.client.liveness-s",
        "1",
        "--orchestrator.client.retries",
        "30",
    ),
    *("--launch.max-restarts", "100", "--launch.backoff-s", "0.1"),
)
SERVERS = ("inference_0", "inference_1", "inference_2")


def pid_of(root, name):
    """The process of one server, if it is there."""
    for pid in processes_of(root, "inference"):
        try:
            if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        except FileNotFoundError:
            continue
    return None


def strike(root, name, number):
    """Send a signal to a server; whether it was there."""
    pid = pid_of(root, name)
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def attack(process, root, rng, steps):
    """Kill or freeze a server after each step but the last two; a frozen one wakes up after a step without it."""
    kills = freezes = 0
    for step in range(1, steps - 1):
        wait_until(lambda step=step: last_step(root) >= step, process=process)
        victim = rng.choice(SERVERS)
        if step % 2:
            kills += strike(root, victim, signal.SIGKILL)
        elif strike(root, victim, signal.SIGSTOP):
            freezes += 1
            wait_until(lambda step=step: last_step(root) > step, process=process)
            strike(root, victim, signal.SIGCONT)
    return kills, freezes


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def check_draws(root, steps):
    draws = [s.draw for k in range(steps) for s in batchlog.read(RunPaths(root), k)[0]]
    assert sorted(draws) == sorted(4 * list(range(4 * steps)))
    said = run("ckpt", "audit", root)
    assert said.startswith("clean\n")
    assert "0 skipped, 0 duplicated\n" in said


@pytest.mark.slow
def test_three_servers_under_kills_and_freezes_end_as_one_that_nothing_happens_to(tmp_path):
    calm, root, steps = tmp_path / "calm", tmp_path / "run", 6
    exact = (*SMALL, "--deterministic", "--max-steps", steps, "--orchestrator.eval.interval", steps)
    run("rl", *exact, "--output-dir", calm)
    process = start("rl", *exact, *POOL, "--output-dir", root)
    kills, freezes = attack(process, root, random.Random(4), steps)
    output = finish(process)
    assert kills >= 1
    assert freezes >= 1
    restarted = [restart.role for restart in attempts.newest(RunPaths(root)).restarts]
    assert len(restarted) == kills
    assert set(restarted) <= set(SERVERS)
    assert all(f"restarts: {name}" in output or f", {name} " in output for name in set(restarted))
    check_draws(root, steps)
    assert run_digest(root) == run_digest(calm)
    assert not processes_of(root)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", [("--deterministic",), ("--max-async-level", "3")])
def test_campaign_of_kills_and_freezes(tmp_path, mode):
    root, steps = tmp_path / "run", 60
    process = start("rl", *SMALL, *mode, *POOL, "--max-steps", steps, "--output-dir", root)
    kills, freezes = attack(process, root, random.Random(11), steps)
    finish(process)
    assert kills > 10
    assert freezes > 10
    check_draws(root, steps)
    rows = metrics.read(RunPaths(root).metric("orchestrator"))
    assert sum(row["fault/servers_silent"] + row["fault/servers_lost"] for row in rows) > 10
