"""The trainer on two ranks: they live and die together, and the run ends as if nothing had happened."""

import os
import signal

import pytest
import torch

from dcp import plain_dcp
from programs import TINY_SFT, last_step, processes_of, rows, run, run_digest, start, wait_until
from ratchet import attempts, durable
from ratchet.paths import RunPaths
from training import ROUNDING, SMOOTH

SFT = (*TINY_SFT, "--max-steps", "6")
TWO = ("--trainer.nproc", "2", "--ckpt.interval", "2")
RL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "6"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Two ranks that nobody disturbs."""
    root = tmp_path_factory.mktemp("calm") / "run"
    run("sft", *SFT, *TWO, "--output-dir", root)
    return root


def ranks(root):
    """The trainer's processes by rank, in which order they were started, once both give signs of life."""
    workshops = RunPaths(root).staging
    wait_until(lambda: list(workshops.glob("*.trainer.*/heartbeat.1")))
    return dict(enumerate(sorted(processes_of(root, "trainer"))))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.campaign), 1])
@pytest.mark.slow
def test_a_rank_that_dies_is_replaced_with_its_siblings(calm, tmp_path, rank):
    root = tmp_path / "run"
    process = start("sft", *SFT, *TWO, "--output-dir", root)
    wait_until(lambda: last_step(root) >= 2, process=process)
    os.kill(ranks(root)[rank], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "The trainer was killed by signal 9: incarnation 2" in said
    assert run_digest(root) == run_digest(calm)


@pytest.mark.campaign
def test_a_rank_that_freezes_is_noticed_while_the_other_waits_for_it(calm, tmp_path):
    root = tmp_path / "run"
    process = start("sft", *SFT, *TWO, "--output-dir", root, "--launch.frozen-s", "4")
    wait_until(lambda: last_step(root) >= 2, process=process)
    os.kill(ranks(root)[1], signal.SIGSTOP)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "gave no sign of life" in said
    (restart,) = attempts.newest(RunPaths(root)).restarts
    assert restart.role == "trainer"
    assert run_digest(root) == run_digest(calm)


@pytest.mark.parametrize("mode", [pytest.param((), marks=pytest.mark.campaign), ("--ckpt.save-async",)])
@pytest.mark.slow
def test_killed_inside_a_save_two_ranks_end_with_the_same_bits(calm, tmp_path, mode):
    command = (*SFT, *TWO, *mode, "--launch.max-restarts", "0", "--output-dir", tmp_path / "run")
    run("sft", *command, code=1, RATCHET_CRASH_AT="checkpoint.after_shards:2")
    assert list(durable.committed(tmp_path / "run" / "checkpoints")) == [2]
    run("sft", *command)
    assert run_digest(tmp_path / "run") == run_digest(calm)
    assert "0 different" in run("trainer", "--replay", tmp_path / "run")


@pytest.mark.campaign
def test_all_ranks_stop_at_the_same_step_and_the_same_command_continues(tmp_path):
    root, whole = tmp_path / "run", tmp_path / "whole"
    two = ("--trainer.nproc", "2", "--ckpt")
    process = start("rl", *RL, *two, "--output-dir", root)
    wait_until(lambda: last_step(root) >= 1, process=process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert list(durable.committed(root / "checkpoints")) == [last_step(root)]
    run("rl", *RL, *two, "--output-dir", root)
    run("rl", *RL, *two, "--output-dir", whole)
    assert run_digest(root) == run_digest(whole)


OPTIM = {"type": "adamw", **SMOOTH}
FP32 = ("--trainer.precision", "fp32", *(f"--trainer.optim.{name}={value}" for name, value in OPTIM.items()))
EXACT = (*SFT, *FP32, "--trainer.scheduler.horizon-steps", "40")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank in fp32, with one micro-batch a step."""
    root = tmp_path_factory.mktemp("alone") / "run"
    run("sft", *EXACT, "--output-dir", root, "--ckpt.interval", "2")
    return root


def assert_close(root, alone):
    """Model and optimizer after six steps."""
    found, expected = (plain_dcp(r / "checkpoints/step_6/trainer") for r in (root, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
def test_one_rank_then_two_then_one_take_the_steps_of_one(alone, tmp_path):
    """One rank by FSDP2, two, then one with the passes that a GPU records."""
    root = tmp_path / "run"
    for steps, layout in ((2, []), (4, ["--trainer.nproc", "2"]), (6, ["--trainer.cuda-graphs"])):
        resume = ("--ckpt.resume-step", "-1", "--max-steps", str(steps))
        said = run("sft", *EXACT, *resume, *layout, "--output-dir", root)
        assert steps == 2 or "Changed: trainer.nproc" in said
    assert [r["step"] for r in rows(root)] == list(range(1, 7))
    assert_close(root, alone)
    for found, expected in zip(rows(root), rows(alone), strict=True):
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=ROUNDING)
    assert "trained on 1, 2 processes" in run("trainer", "--replay", root, code=2)


@pytest.mark.slow
def test_two_copies_of_the_model_and_other_micro_batches_take_the_steps_of_one_rank(alone, tmp_path):
    """HSDP, with a quarter of the budget: the batch of a step and its mean over tokens are the same."""
    layout = (
        "--trainer.nproc",
        "2",
        "--trainer.parallel.replicate",
        "2",
        "--trainer.micro-batch-tokens",
        "256",
    )
    run("sft", *EXACT, *layout, "--output-dir", tmp_path / "run", "--ckpt.interval", "2")
    assert_close(tmp_path / "run", alone)
    for found, expected in zip(rows(tmp_path / "run"), rows(alone), strict=True):
        assert found.keys() == expected.keys()
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=ROUNDING)
        assert found.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=ROUNDING)
        assert found == expected
