"""A run on a cluster: its programs as jobs of submitit's local executor, and its checkpoints in a mirror.

Real processes that meet in the run directory alone; a disk that is gone; an upload that is killed.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from programs import BIN, TINY_SFT, last_step, processes_of, rows, run, run_digest, start, wait_until
from ratchet import attempts, digest, durable
from ratchet.launch import cluster
from ratchet.paths import RunPaths
from ratchet.stage import Stage

SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "5"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.eval.interval", "3", "--ckpt.interval", "3"),
)
SLURM = ("--slurm.executor", "local", "--slurm.wait", "--slurm.wait-s", "60")


def jobs(root):
    """The newest job of each program, by its process id."""
    lines = (root / "slurm" / "jobs.jsonl").read_bytes().splitlines()
    return {line["name"]: int(line["job"]) for line in map(msgspec.json.decode, lines)}


def tasks_of(pid):
    """The processes that a local job runs, without what its program starts."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def outcomes(root):
    paths = RunPaths(root)
    records = [attempts.read(paths, number) for number in attempts.numbers(paths)]
    return [record.outcome.code if record.outcome else None for record in records]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that nobody disturbs, on one machine, with a mirror; and the command that made it."""
    folder = tmp_path_factory.mktemp("calm")
    command = (*SMALL, "--ckpt.mirror", f"file://{folder / 'mirror'}", "--output-dir", folder / "run")
    run("rl", *command)
    return folder, command


def preempt(process, root):
    """Send the trainer's job what Slurm sends where it preempts, once a step is done; returns the step saved."""
    wait_until(lambda: last_step(root) >= 1, timeout_s=240, process=process)
    os.kill(jobs(root)["trainer"], signal.SIGTERM)
    wait_until(lambda: outcomes(root)[:1] == [75], timeout_s=30, process=process)
    return max(durable.committed(RunPaths(root).checkpoints))


def check_the_end(process, root, calm):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert outcomes(root)[0] == 75
    assert outcomes(root)[-1] == 0
    assert run_digest(root) == run_digest(calm)
    assert not processes_of(root)
    assert "clean" in run("ckpt", "audit", root)


@pytest.mark.slow
def test_a_preempted_trainer_saves_is_queued_again_and_the_run_ends_the_same(calm, tmp_path):
    process = start("rl", *SMALL, *SLURM, "--output-dir", tmp_path)
    preempt(process, tmp_path)
    check_the_end(process, tmp_path, calm[0] / "run")
    # The command without the table is the same command: the run is complete.
    assert "complete" in run("rl", *SMALL, "--output-dir", tmp_path)


@pytest.mark.campaign
def test_the_end_of_its_time_and_the_death_of_the_server_do_not_matter_either(tmp_path):
    steps = ("--max-steps", "8")
    run("rl", *SMALL, *steps, "--output-dir", tmp_path / "calm")
    root = tmp_path / "run"
    process = start("rl", *SMALL, *steps, *SLURM, "--output-dir", root)
    stopped = preempt(process, root)
    wait_until(lambda: last_step(root) > stopped, process=process)
    (server,) = processes_of(root, "inference")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: last_step(root) > stopped + 1, process=process)
    (task,) = tasks_of(jobs(root)["trainer"])
    # What Slurm sends before a job's time is over: to every process of the job.
    for process_id in (*processes_of(root, "trainer"), task, *tasks_of(task)):
        os.kill(process_id, signal.SIGUSR2)
    check_the_end(process, root, tmp_path / "calm")
    assert outcomes(root) == [75, 75, 0]


@pytest.mark.slow
def test_a_run_whose_disk_is_gone_comes_back_from_its_mirror(calm):
    """The newest entry is torn as well: it has no manifest."""
    folder, command = calm
    root, whole = folder / "run", folder / "whole"
    root.rename(whole)
    newest = max((folder / "mirror").glob("step_5.*"))
    (newest / "MANIFEST.json").unlink()
    said = run("rl", *command)
    assert "holds steps 3: restoring step 3" in said
    assert "Not mirrored, so gone with the disk: batches, the journal" in said
    assert "Continuing at step 3" in said
    for role in ("trainer", "orchestrator", "evals"):
        assert rows(root, role) == rows(whole, role)
    came_back, before = digest.parts(root), digest.parts(whole)
    gone = {f"batches/step_{step}" for step in range(3)}
    assert {name for name in before if came_back.get(name) != before[name]} - {
        "weights/step_0",
        "weights/step_1",
    } == gone
    assert digest.run_digest(root) == digest.run_digest(whole)
    assert not newest.exists()  # the torn one went when the step was uploaded again
    audit = run("ckpt", "audit", root)
    assert "the proof from batches begins at batch 3" in audit
    assert "clean" in audit
    shutil.rmtree(root)
    whole.rename(root)


def test_an_address_is_found_only_in_the_attempt_whose_server_said_it(tmp_path):
    paths = RunPaths(tmp_path)
    paths.staging.mkdir()
    for token, url in (("003.inference.2", "http://a:1"), ("003.inference.10", "http://b:2")):
        Stage.open(paths, token)
        cluster.publish(paths, token, url)
    Stage.open(paths, "003.inference.11")  # it has not said anything yet
    assert cluster.find_address(paths, 3) == "http://b:2"
    assert cluster.find_address(paths, 30) is None
    launcher = Stage.open(paths, "004.launcher.0")
    launcher.revoke()
    assert cluster.find_address(paths, 3) is None


# Three jobs start as any program does, one after the other on a small machine, and twice.
pytestmark = pytest.mark.timeout(600)

SFT = (*TINY_SFT, "--max-steps", "4", "--ckpt.interval", "2")
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def s3(monkeypatch):
    """An S3 API on a free port, with a bucket; what s3fs needs to find it is in the environment."""
    server = subprocess.Popen(
        [BIN / "moto_server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in server.stderr:
        if found := re.search(r"Running on (http://\S+)", line):
            break
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": found[1]}.items():
        monkeypatch.setenv(name, value)
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    store.mkdir("bucket")
    yield store
    kill_server(server)


def kill_server(server):
    server.kill()
    server.wait()
    server.stderr.close()


@pytest.mark.campaign
def test_uploads_to_s3_that_are_killed_inside_are_not_believed(s3, tmp_path):
    """Checkpoints are so far apart that the first is uploaded before there is a second."""
    root = tmp_path / "run"
    settings = (*TINY_SFT, "--max-steps", "160", "--ckpt.interval", "80")
    command = (
        *settings,
        "--launch.max-restarts",
        "0",
        "--ckpt.mirror",
        "s3://bucket/run",
        "--output-dir",
        root,
    )
    run("sft", *settings, "--output-dir", tmp_path / "calm")

    def torn():
        return [path for path in s3.ls("bucket/run") if not s3.exists(f"{path}/MANIFEST.json")]

    run("sft", *command, code=1, RATCHET_CRASH_AT="mirror.after_file:3")
    (first,) = torn()
    run("sft", *command, code=1, RATCHET_CRASH_AT="mirror.committed:1")
    assert len(s3.ls("bucket/run")) == 2
    run("sft", *command, code=1, RATCHET_CRASH_AT="mirror.before_manifest:1")
    (second,) = torn()
    assert ("/step_80." in first, "/step_160." in second) == (True, True)
    shutil.rmtree(root)
    assert "holds steps 80: restoring step 80" in run("sft", *command)
    assert run_digest(root) == run_digest(tmp_path / "calm")
    assert torn() == []
