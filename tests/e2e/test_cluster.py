"""The programs of a run as jobs of submitit's local executor: real processes that meet in the run directory alone."""

import os
import signal
from pathlib import Path

import msgspec
import pytest

from programs import last_step, processes_of, run, run_digest, start, wait_until
from ratchet import attempts, durable
from ratchet.launch import cluster
from ratchet.paths import RunPaths

SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "7"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.eval.interval", "3", "--ckpt.interval", "5"),
)
SLURM = ("--slurm.executor", "local", "--slurm.wait", "--slurm.wait-s", "60")


def jobs(root):
    """The newest job of each role, by its process id."""
    lines = (root / "slurm" / "jobs.jsonl").read_bytes().splitlines()
    return {line["role"]: int(line["job"]) for line in map(msgspec.json.decode, lines)}


def tasks_of(pid):
    """The processes that a local job runs, without what its program starts."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def outcomes(root):
    paths = RunPaths(root)
    records = [attempts.read(paths, number) for number in attempts.numbers(paths)]
    return [record.outcome.code if record.outcome else None for record in records]


def test_a_preempted_trainer_saves_is_queued_again_and_the_run_ends_the_same(tmp_path):
    calm, root = tmp_path / "calm", tmp_path / "run"
    run("rl", *SMALL, "--output-dir", calm)
    process = start("rl", *SMALL, *SLURM, "--output-dir", root)
    wait_until(lambda: last_step(root) >= 1, process=process)
    os.kill(jobs(root)["trainer"], signal.SIGTERM)  # as Slurm does where it preempts
    wait_until(lambda: outcomes(root)[:1] == [75], timeout_s=30, process=process)
    stopped = max(durable.committed(RunPaths(root).checkpoints))
    assert stopped not in (0, 5)  # no interval asked for it
    wait_until(lambda: last_step(root) > stopped, process=process)
    (server,) = processes_of(root, "inference")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: last_step(root) > stopped + 1, process=process)
    (task,) = tasks_of(jobs(root)["trainer"])
    os.kill(task, signal.SIGUSR2)  # as Slurm does before a job's time is over
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert outcomes(root) in ([75, 75, 0], [75, 0])  # the last signal may have come after the last step
    assert run_digest(root) == run_digest(calm)
    assert not processes_of(root)
    assert "clean" in run("ckpt", "audit", root)
    # The command without the table is the same command: the run is complete.
    assert "complete" in run("rl", *SMALL, "--output-dir", root)


def test_an_address_is_found_only_in_the_attempt_whose_server_said_it(tmp_path):
    paths = RunPaths(tmp_path)
    paths.staging.mkdir()
    for token, url in (("003.inference.2", "http://a:1"), ("003.inference.10", "http://b:2")):
        durable.Stage.open(paths, token)
        cluster.publish(paths, token, url)
    durable.Stage.open(paths, "003.inference.11")  # it has not said anything yet
    assert cluster.find_address(paths, 3) == "http://b:2"
    assert cluster.find_address(paths, 30) is None
    launcher = durable.Stage.open(paths, "004.launcher.0")
    durable.revoke(paths, by=launcher)
    assert cluster.find_address(paths, 3) is None


def test_a_machine_that_does_not_see_the_run_directory_says_so(tmp_path, monkeypatch):
    from ratchet.errors import Refusal
    from ratchet.launch import filesystem
    from ratchet.launch.slurm import Job

    monkeypatch.setattr(filesystem, "VISIBLE_S", 0.1)
    with pytest.raises(Refusal, match="put --output-dir on a file system that all machines share"):
        Job("rl", "trainer", "", str(tmp_path), "seen-1", requeue_on_term=True)()
