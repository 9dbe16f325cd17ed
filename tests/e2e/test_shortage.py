"""A disk that cannot take a checkpoint: the run goes on, tries again, and stops with its own code in the end.

The shortage is the kernel's: a limit on the size of a file, below that of a shard and above that of a policy.
"""

import re
import resource

import pytest

from programs import last_step, processes_of, rows, run, start, wait_until
from ratchet.durable import committed

EXAMPLE = ("@", "examples/reverse_text/sft.toml", "--data.batch-size", "16")
BETWEEN = 2_000_000
NEVER = resource.RLIM_INFINITY


def limit(root, size_bytes):
    (trainer,) = processes_of(root, "trainer")
    resource.prlimit(trainer, resource.RLIMIT_FSIZE, (size_bytes, NEVER))


def log_of(root):
    return (root / "attempts" / "001" / "trainer.log").read_text()


@pytest.mark.parametrize("mode", [(), ("--ckpt.save-async",)], ids=["sync", "async"])
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
    assert {3, 39, 40} <= set(saved)
    assert len(saved) < 14
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 41))


def test_after_so_many_failures_it_stops_with_exit_74_and_the_same_command_continues(tmp_path):
    command = (*EXAMPLE, "--output-dir", tmp_path, "--ckpt.interval", "3", "--ckpt.max-failed-saves", "2")
    process = start("sft", *command)
    wait_until(lambda: committed(tmp_path / "checkpoints"), process=process)
    limit(tmp_path, BETWEEN)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 74, output
    assert "make room" in output
    last = max(committed(tmp_path / "checkpoints"))
    assert last < last_step(tmp_path) < 40
    said = run("sft", *command)
    assert re.search(f"Continuing at step {last}", said)
    assert max(committed(tmp_path / "checkpoints")) == 40
