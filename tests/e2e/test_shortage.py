"""A run directory that cannot take what a run writes: full, gone, read-only, or in use.

A full disk is the kernel's limit on the size of a file, below that of a shard and above that of a policy: the run
goes on, tries again, and stops with its own code in the end.
"""

import re
import resource
import shlex
import subprocess

import pytest

from programs import BIN, ROOT, TINY_SFT, last_step, processes_of, rows, run, start, wait_until
from ratchet.durable import committed

EXAMPLE = (*TINY_SFT, "--max-steps", "20")
BETWEEN = 1_375_000  # a policy has 1.35 MB, each of the two files of a checkpoint 1.40
NEVER = resource.RLIM_INFINITY


def limit(root, size_bytes):
    (trainer,) = processes_of(root, "trainer")
    resource.prlimit(trainer, resource.RLIMIT_FSIZE, (size_bytes, NEVER))


def log_of(root):
    return (root / "attempts" / "001" / "trainer.log").read_text()


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param((), id="sync", marks=pytest.mark.slow),
        pytest.param(("--ckpt.save-async",), id="async"),
    ],
)
def test_a_failed_save_is_said_and_tried_again_at_the_next_interval(tmp_path, mode):
    process = start(
        "sft",
        *EXAMPLE,
        "--output-dir",
        tmp_path,
        "--ckpt.interval",
        "3",
        "--ckpt.max-failed-saves",
        "99",
        *mode,
    )
    wait_until(lambda: committed(tmp_path / "checkpoints"), process=process)
    limit(tmp_path, BETWEEN)
    wait_until(lambda: "the next interval tries again" in log_of(tmp_path), process=process)
    limit(tmp_path, NEVER)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    saved = list(committed(tmp_path / "checkpoints"))
    assert {3, 18, 20} <= set(saved)
    assert len(saved) < 7
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 21))


@pytest.mark.slow
def test_after_so_many_failures_it_stops_with_exit_74_and_the_same_command_continues(tmp_path):
    command = (*EXAMPLE, "--output-dir", tmp_path, "--ckpt.interval", "3", "--ckpt.max-failed-saves", "2")
    process = start("sft", *command)
    wait_until(lambda: committed(tmp_path / "checkpoints"), process=process)
    limit(tmp_path, BETWEEN)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 74, output
    assert "make room" in output
    last = max(committed(tmp_path / "checkpoints"))
    assert last < last_step(tmp_path) < 20
    said = run("sft", *command)
    assert re.search(f"Continuing at step {last}", said)
    assert max(committed(tmp_path / "checkpoints")) == 20


@pytest.mark.slow
def test_a_run_directory_that_vanishes_ends_the_run_and_brought_back_it_continues(tmp_path):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    command = (*EXAMPLE, "--output-dir", root, "--ckpt.interval", "3")
    process = start("sft", *command)
    wait_until(lambda: committed(root / "checkpoints"), process=process)
    root.rename(elsewhere)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 74, output
    assert f"The run directory {root} is gone" in output
    assert processes_of(root) == []
    assert not root.exists()
    elsewhere.rename(root)
    assert "Continuing at step" in run("sft", *command)
    assert [row["step"] for row in rows(root)] == list(range(1, 21))


READ_ONLY = """
mount --bind {root} {root}
mount -o remount,ro,bind {root}
exec {command}
"""


def read_only(root, command):
    """A command for which the file system under a run is read-only; root may write anywhere else."""
    script = READ_ONLY.format(root=root, command=shlex.join(command))
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-ec", script],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_read_only_run_directory_is_refused_before_anything_starts(tmp_path):
    command = (*EXAMPLE, "--output-dir", tmp_path, "--max-steps", "4", "--ckpt.interval", "2")
    run("sft", *command)
    before = sorted(tmp_path.rglob("*"))
    again = [
        str(word) for word in (BIN / "sft", *command[:-4], "--max-steps", "8", "--ckpt.resume-step", "-1")
    ]
    code, said = read_only(tmp_path, again)
    assert code == 2, said
    assert f"The run directory {tmp_path} cannot be written (Read-only file system" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.campaign
def test_a_second_launcher_on_one_directory_is_refused_and_disturbs_nothing(tmp_path):
    command = (*EXAMPLE, "--output-dir", tmp_path, "--ckpt.interval", "3")
    process = start("sft", *command)
    wait_until(lambda: last_step(tmp_path), process=process)
    assert f"{tmp_path} is in use by another launcher" in run("sft", *command, code=2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert len(list((tmp_path / "attempts").iterdir())) == 1


@pytest.mark.slow
def test_a_policy_that_cannot_be_published_ends_the_run_although_no_batch_comes(tmp_path):
    """It is written beside the next step, which would wait for ever: the orchestrator has no policy to sample with."""
    command = (
        *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
        *(
            "--model.random-init",
            "--inference.slots",
            "16",
            "--max-steps",
            "20",
            "--launch.max-restarts",
            "0",
        ),
        *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4", "--ckpt.interval", "15"),
        *("--orchestrator.sampling.max-tokens", "6", "--output-dir", tmp_path),
    )
    process = start("rl", *command)
    wait_until(lambda: last_step(tmp_path) >= 1, process=process)
    limit(tmp_path, 500_000)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 74, output
    assert "make room" in output
    assert not processes_of(tmp_path)
    assert last_step(tmp_path) < 15
    run("rl", *command)
    assert last_step(tmp_path) == 20
