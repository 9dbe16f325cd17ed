"""Policies through memory: the same run as through the disk, whoever dies, and nothing left in memory."""

import os
import signal
import threading
from pathlib import Path

import pytest

from programs import kill, last_step, processes_of, rows, run, run_digest, start, wait_until
from ratchet import attempts, durable
from ratchet.audit import audit
from ratchet.paths import RunPaths

SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "11"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
    *("--orchestrator.eval.interval", "5", "--ckpt.interval", "3"),
)
MEMORY = ("--weights.transport", "memory", "--weights.publish-interval", "4")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """By the disk, with nothing that happens."""
    root = tmp_path_factory.mktemp("calm") / "run"
    run("rl", *SMALL, "--output-dir", root)
    return root


def parts_in_memory(root):
    run_id = attempts.newest(RunPaths(root)).run_id
    return list(Path("/dev/shm").glob(f"ratchet-*-{run_id}"))


def check_equal(root, calm):
    assert run_digest(root) == run_digest(calm)
    for role in ("trainer", "orchestrator", "evals"):
        assert rows(root, role) == rows(calm, role)
    assert audit(RunPaths(root)).findings == []
    assert parts_in_memory(root) == []
    assert not os.listdir(root / "staging")


@pytest.mark.slow
def test_by_memory_a_run_is_the_same_also_when_each_program_and_then_all_are_killed(calm, tmp_path):
    root = tmp_path / "run"
    command = ("rl", *SMALL, *MEMORY, "--output-dir", root, "--launch.max-restarts", "0")
    for step, victims in ((1, ["trainer"]), (4, ["orchestrator"]), (5, ["inference"]), (7, ["", "launcher"])):
        process = start(*command)
        wait_until(lambda step=step: last_step(root) >= step, process=process)
        if "launcher" in victims:
            for pid in processes_of(root):
                os.kill(pid, signal.SIGKILL)
            kill(process)
            assert parts_in_memory(root), "nobody was there to give it back"
        else:
            wait_until(lambda role=victims[0]: processes_of(root, role), process=process)
            os.kill(processes_of(root, victims[0])[0], signal.SIGKILL)
            process.communicate(timeout=60)
            assert parts_in_memory(root) == []
        wait_until(lambda: not processes_of(root), timeout_s=10)
    run(*command)
    check_equal(root, calm)


def test_a_trainer_that_is_replaced_finds_its_policies_in_memory(calm, tmp_path):
    root = tmp_path / "run"
    process = start("rl", *SMALL, *MEMORY, "--output-dir", root)
    wait_until(lambda: last_step(root) >= 4, process=process)
    (trainer,) = processes_of(root, "trainer")
    os.kill(trainer, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "The trainer was killed by signal 9: incarnation 2" in said
    assert "not bitwise" not in (root / "attempts" / "001" / "trainer.log").read_text()
    check_equal(root, calm)


@pytest.mark.slow
def test_a_stop_at_any_step_leaves_on_the_disk_what_the_next_start_needs(calm, tmp_path):
    root = tmp_path / "run"
    command = ("rl", *SMALL, *MEMORY, "--output-dir", root)
    for step in (1, 4, 7):
        process = start(*command)
        wait_until(lambda step=step: last_step(root) >= step, process=process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 75, said
        saved = max(durable.committed(RunPaths(root).checkpoints))
        assert {saved - 1, saved} <= set(durable.steps(RunPaths(root).weights))
    run(*command)
    check_equal(root, calm)


@pytest.mark.slow
def test_a_run_may_change_the_way_of_its_policies_when_it_is_resumed(calm, tmp_path):
    root = tmp_path / "run"
    run("rl", *SMALL, *MEMORY, "--output-dir", root, "--max-steps", "5")
    more = ("--ckpt.resume-step", "-1", "--output-dir", root)
    said = run("rl", *SMALL, *more, "--max-steps", "8")
    assert "Changed" not in said
    run("rl", *SMALL, *MEMORY, *more)
    assert rows(root)[-1] == rows(calm)[-1]
    assert parts_in_memory(root) == []


@pytest.mark.slow
def test_the_programs_alone_use_the_memory_of_their_machine(calm, tmp_path):
    root = tmp_path / "run"
    server = start("inference", *SMALL, "--inference.port", "0")
    url = (
        next(line for line in server.stdout if " at http" in line)
        .rpartition(" at ")[2]
        .split()[0]
        .rstrip(",.")
    )
    drain = threading.Thread(target=server.stdout.read, daemon=True)
    drain.start()
    split = ("--orchestrator.client.base-url", url, "--output-dir", root)
    orchestrator = start("orchestrator", *SMALL, *MEMORY, *split)
    run("trainer", *SMALL, *MEMORY, *split)
    said, _ = orchestrator.communicate(timeout=60)
    assert orchestrator.returncode == 0, said
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=20)
    drain.join()
    server.stdout.close()
    assert run_digest(root) == run_digest(calm)
    assert parts_in_memory(root) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--weights.publish-interval", "2"), "needs transport = 'memory'"),
        ((*MEMORY, "--weights.memory-dir", "/"), "not on a tmpfs: choose another"),
        ((*MEMORY, "--weights.memory-dir", "/no/such"), "no directory that can be written"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_touches_nothing(tmp_path, flags, says):
    said = run("rl", *SMALL, *flags, "--output-dir", tmp_path / "run", code=2)
    assert says in said
    assert not (tmp_path / "run" / "attempts").exists()
