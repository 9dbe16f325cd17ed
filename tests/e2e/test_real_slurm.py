"""`--slurm` on a real Slurm of two nodes; where it is not installed there is nothing here (`tests/conftest.py`)."""

import os
import re
import subprocess

import msgspec
import pytest

from programs import last_step, processes_of, run, run_digest, start, wait_until
from ratchet import attempts, durable
from ratchet.paths import RunPaths
from slurm_cluster import cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--inference.replicas", "2", "--deterministic"),
    *("--max-steps", "40", "--ckpt.interval", "20", "--orchestrator.batch-size", "16"),
    *("--orchestrator.group-size", "4", "--orchestrator.sampling.max-tokens", "6"),
    *("--orchestrator.eval.tasks", "8", "--orchestrator.eval.interval", "20"),
)


@pytest.fixture
def slurm(monkeypatch):
    """A cluster; Slurm's commands find it."""
    with cluster() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield


def jobs(root):
    """The newest job of each program."""
    lines = (root / "slurm" / "jobs.jsonl").read_bytes().splitlines()
    return {line["name"]: line["job"] for line in map(msgspec.json.decode, lines)}


def slurm_says(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_two_nodes_and_two_servers_as_jobs_and_a_trainer_that_is_queued_again(slurm, tmp_path):
    """The bits are those of two ranks on one machine that nothing happened to."""
    run("rl", *SMALL, "--trainer.nproc", "2", "--output-dir", tmp_path / "calm")
    root = tmp_path / "run"
    command = (*SMALL, "--trainer.nnodes", "2", "--slurm", "--slurm.partition", "cpu", "--output-dir", root)
    first = run("rl", *command)
    assert len(re.findall(r": job \d+, its log is", first)) == 4
    wait_until(lambda: last_step(root) >= 1, timeout_s=240)
    said = run("rl", *command)
    assert len(re.findall(r": job \d+ is there already", said)) == 4
    subprocess.run(["scontrol", "requeue", jobs(root)["trainer"]], check=True)
    process = start("rl", *command, "--slurm.wait")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert not processes_of(root)
    paths = RunPaths(root)
    outcomes = [attempts.read(paths, number).outcome for number in attempts.numbers(paths)]
    assert [outcome.code for outcome in outcomes] == [75, 0]
    assert max(durable.committed(paths.checkpoints)) == 40
    assert run_digest(root) == run_digest(tmp_path / "calm")
    assert "clean" in run("ckpt", "audit", root)
    assert "NumNodes=2" in slurm_says("scontrol", "show", "job", jobs(root)["trainer"])
    assert os.listdir(root / "slurm" / "inference_1")
