"""RL as a user runs it: three real programs, a standing server, stops, kills, and the proof of what came out."""

import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from programs import (
    kill,
    last_step,
    outcome,
    processes_of,
    rows,
    run,
    run_digest,
    start,
    wait_until,
)
from ratchet import batchlog, durable, metrics
from ratchet.config import ModelConfig
from ratchet.durable import committed
from ratchet.models.build import build
from ratchet.models.logprobs import Policy
from ratchet.paths import RunPaths
from ratchet.trainer.packing import Example, micro_batches

MODEL = ("--model.name", "examples/reverse_text/model", "--model.random-init")
SMALL = (
    *MODEL,
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8"),
)
ALONE = ("@", "examples/reverse_text/rl.toml", *SMALL, "--inference.slots", "16")
TRAIN, ORCH = "examples/reverse_text/train.toml", "examples/reverse_text/orch.toml"
SPLIT = ("--trainer", "@", TRAIN, "--orchestrator", "@", ORCH)


@pytest.mark.slow
def test_deterministic_ten_plus_ten_equals_twenty(tmp_path):
    command = (*ALONE, "--deterministic", "--orchestrator.eval.interval", "10")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("rl", *command, "--output-dir", whole, "--ckpt.interval", "10")
    run("rl", *command, "--output-dir", parts, "--max-steps", "10", "--ckpt")
    run("rl", *command, "--output-dir", parts, "--max-steps", "20", "--ckpt.resume-step", "10")
    assert len(rows(whole)) == len(rows(whole, "orchestrator")) == 20
    assert rows(parts) == rows(whole)
    assert run_digest(parts) == run_digest(whole)


@pytest.mark.campaign
def test_without_restarts_deterministic_survives_the_death_of_each_program(tmp_path):
    steps = ("--max-steps", "8", "--ckpt.interval", "3")
    command = (*ALONE, "--deterministic", *steps, "--launch.max-restarts", "0")
    root, calm = tmp_path / "run", tmp_path / "calm"
    run("rl", *command, "--output-dir", calm)
    for role in ("trainer", "orchestrator", "inference"):
        process = start("rl", *command, "--output-dir", root)
        before = last_step(root)
        wait_until(lambda before=before: last_step(root) > before, process=process)
        (victim,) = processes_of(root, role)
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
        assert f"{role} was killed by signal 9" in output
        assert not processes_of(root)
    # The last evaluation is published, and the orchestrator dies before it appends the row.
    run("rl", *command, "--output-dir", root, code=1, RATCHET_CRASH_AT="eval.committed:1")
    run("rl", *command, "--output-dir", root)
    assert run_digest(root) == run_digest(calm)


def kill_inside_a_save(process, root):
    """Kill at an instant at which a checkpoint is being written, and say whether it was."""
    staging = RunPaths(root).staging
    wait_until(lambda: list(staging.glob("*.trainer.*/*-checkpoint_*")), process=process)
    kill(process)


def kill_after_a_step(process, root, rng):
    before = last_step(root)
    wait_until(lambda: last_step(root) > before or process.poll() is not None)
    threading.Event().wait(rng.uniform(0, 0.4))
    kill(process)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_ten_kills_of_the_whole_run_and_the_same_command_each_time(tmp_path):
    rng, root = random.Random(7), tmp_path / "run"
    command = (*ALONE, "--output-dir", root, "--ckpt.interval", "2")
    floor, kills, in_saves = 0, 0, 0
    while kills < 10:
        process = start("rl", *command)
        if kills in (2, 5, 8) and last_step(root) < 16:
            kill_inside_a_save(process, root)
            in_saves += 1
        else:
            kill_after_a_step(process, root, rng)
        kills += 1
        wait_until(lambda: not processes_of(root), timeout_s=5)
        newest = max(committed(root / "checkpoints"), default=0)
        assert newest >= floor, "a commit was lost"
        floor = newest
    assert in_saves >= 2
    said = run("rl", *command)
    assert "starting again at step 0" not in said
    assert last_step(root) == 20
    assert outcome(root)["code"] == 0
    assert "complete" in run("rl", *command)
    assert [row["step"] for row in rows(root)] == list(range(1, 21))
    draws = [s.draw for k in range(20) for s in batchlog.read(RunPaths(root), k)[0]]
    assert len(draws) == len(set(draws)) * 4  # each draw is trained once, as one group of four
    said = run("ckpt", "audit", root)
    assert said.startswith("clean\n")
    assert "0 skipped, 0 duplicated\n" in said


@pytest.fixture(scope="module")
def server():
    """A standing server on a free port, with a model of its own random weights."""
    process = start(
        "inference", "@", "examples/reverse_text/infer.toml", *MODEL, "--seed", "5", "--inference.port", "0"
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"at (http://\S+)", line):
            break
    else:
        raise AssertionError("".join(lines))
    drain = threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True)
    drain.start()
    yield found[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    drain.join()
    process.stdout.close()


def test_the_documented_commands_continue_exactly_on_a_standing_server(server, tmp_path):
    base = (*SPLIT, *SMALL, "--orchestrator.client.base-url", server)
    # Another run leaves its policy on the server first.
    run("rl", *base, "--output-dir", tmp_path / "other", "--max-steps", "2", "--seed", "9")
    root, whole = tmp_path / "run", tmp_path / "whole"
    run("rl", *base, "--output-dir", root, "--max-steps", "5", "--ckpt")
    run("rl", *base, "--output-dir", tmp_path / "other2", "--max-steps", "7", "--seed", "9")
    said = run("rl", *base, "--output-dir", root, "--max-steps", "10", "--ckpt.resume-step", "5")
    assert "Resuming at step 5" in said
    run("rl", *base, "--output-dir", whole, "--max-steps", "10", "--ckpt.interval", "5")
    paths = RunPaths(root)
    batches = [batchlog.read(paths, k)[0] for k in range(10)]
    draws = [draw for samples in batches for draw in {s.draw for s in samples}]
    assert len(draws) == len(set(draws)) == 10 * 4
    # The first batch after the resume was sampled by policy 5 of this run and by nothing else.
    assert {span.step for s in batches[5] for span in s.versions} == {5}
    trainer, orchestrator = rows(root), rows(root, "orchestrator")
    assert [row["step"] for row in trainer] == [row["step"] for row in orchestrator] == list(range(1, 11))
    total = 0
    for k, (row, other) in enumerate(zip(trainer, orchestrator, strict=True)):
        total += sum(len(s.token_ids) for s in batches[k])
        assert row["progress/total_samples"] == other["progress/total_samples"] == 16 * (k + 1)
        assert row["progress/total_problems"] == other["progress/total_problems"] == 4 * (k + 1)
        assert row["progress/total_tokens"] == other["progress/total_tokens"] == total
    assert [row["lr"] for row in trainer] == [row["lr"] for row in rows(whole)]


def test_engine_and_trainer_agree_on_the_logprob_of_every_token(tmp_path):
    run(
        *("rl", *ALONE, "--output-dir", tmp_path, "--max-steps", "4", "--max-async-level", "0"),
        *(
            "--trainer.precision",
            "fp32",
            "--ckpt.interval",
            "1",
            "--orchestrator.sampling.temperature",
            "0.7",
        ),
    )
    worst = {"fp32": 0.0, "bf16": 0.0}
    for step in range(1, 4):
        samples, manifest = batchlog.read(RunPaths(tmp_path), step)
        assert {span.step for s in samples for span in s.versions} == {step}
        model = ModelConfig(name=str(tmp_path / "weights" / f"step_{step}"), attention="eager")
        policy = Policy(build(model, seed=0))
        examples = [Example(s.token_ids, s.mask, s.logprobs, 0.0) for s in samples]
        (micro,) = micro_batches(examples, 10**6, 0, 1, shares_prompts=True)
        assert micro.branches is not None
        tensors = [torch.from_numpy(x) for x in (micro.inputs_BT, micro.cells_N, micro.targets_N)]
        shared = tuple(torch.from_numpy(x) for x in micro.branches)
        for precision in worst:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logprobs = policy(*tensors, manifest.meta["temperature"], shared)
            found = (logprobs - torch.from_numpy(micro.behaviour_N)).abs().max().item()
            worst[precision] = max(worst[precision], found)
    assert worst["fp32"] <= 1e-4, worst
    row = rows(tmp_path)[-1]
    assert row["policy/off_policy_steps"] == 0
    assert abs(row["policy/ratio_mean"] - 1) < 1e-4


@pytest.mark.slow
def test_a_signal_stops_all_programs_and_the_same_command_continues(tmp_path):
    command = (*ALONE, "--output-dir", tmp_path, "--ckpt")
    process = start("rl", *command)
    wait_until(lambda: last_step(tmp_path) >= 2, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert not processes_of(tmp_path)
    (stopped,) = committed(tmp_path / "checkpoints")
    assert f"Continuing at step {stopped}" in run("rl", *command)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 21))


@pytest.mark.slow
def test_without_checkpoints_batches_and_weights_do_not_pile_up(tmp_path):
    run("rl", *ALONE, "--output-dir", tmp_path, "--max-steps", "12")
    assert not committed(tmp_path / "checkpoints")
    assert list(committed(tmp_path / "batches")) == [11]  # the last one holds the orchestrator's state
    assert max(committed(tmp_path / "weights")) == 12
    assert len(committed(tmp_path / "weights")) <= 4


@pytest.mark.slow
def test_a_rollback_moves_the_future_aside_and_the_old_weights_are_not_believed(tmp_path):
    command = (*ALONE, "--deterministic", "--output-dir", tmp_path, "--orchestrator.eval.interval", "3")
    run("rl", *command, "--max-steps", "6", "--ckpt.interval", "3")
    before = run_digest(tmp_path)
    said = run("rl", *command, "--max-steps", "6", "--ckpt.interval", "3", "--ckpt.resume-step", "3")
    assert "Rolling back to step 3" in said
    aside = tmp_path / "superseded" / "002"
    assert {p.name for p in (aside / "batches").iterdir()} == {"step_3", "step_4", "step_5"}
    assert (aside / "checkpoints" / "step_6").exists()
    assert run_digest(tmp_path) == before


REFUSED = [
    ("unknown key", ("--trainer.optm.lr", "1"), "did you mean"),
    ("missing file", ("--orchestrator", "@", "no.toml"), "no.toml"),
    ("no such step", ("--ckpt.resume-step", "3"), "there are: 2, 4"),
    ("other command", ("--trainer.optim.lr", "1e-4"), "--ckpt.resume-step -1"),
    ("max_steps too low", ("--max-steps", "2", "--ckpt.resume-step", "4"), "max_steps is 2"),
    ("fixed key", ("--seed", "1", "--ckpt.resume-step", "4"), "seed: 0 -> 1"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "run"
    run("rl", *ALONE, "--max-steps", "4", "--ckpt.interval", "2", "--output-dir", root)
    return root


def contents(root):
    published = ("checkpoints", "batches", "weights", "metrics")
    return {p: p.read_bytes() for name in published for p in sorted((root / name).rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("flags", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_one_sentence_and_touches_nothing(finished, flags, says):
    before = contents(finished)
    command = (*ALONE, "--max-steps", "4", "--ckpt.interval", "2", "--output-dir", finished, *flags)
    said = run("rl", *command, code=2)
    assert says in said
    assert len(said.strip().splitlines()) == 1, said
    assert "Traceback" not in said
    assert contents(finished) == before


def test_what_a_run_needs_is_checked_before_it_begins(tmp_path):
    config, sft, data = tmp_path / "rl.toml", tmp_path / "sft.toml", tmp_path / "bad.jsonl"
    example = Path("examples/reverse_text/rl.toml").read_text()
    sft.write_text(f'output_dir = "{tmp_path / "sft"}"\n')
    data.write_text('{"text": "fine"}\n{"txt": "not fine"}\n')
    model, train = "outputs/reverse_text/sft/weights/step_40", "examples/reverse_text/train.jsonl"
    cases = {
        "The model directory outputs/no/model does not exist": (model, "outputs/no/model", ()),
        f"make it with `uv run sft @ {sft}`": (model, f"{tmp_path}/sft/weights/step_40", ()),
        "no.jsonl": (train, "no.jsonl", MODEL),
        "bad.jsonl, line 2": (train, str(data), MODEL),
    }
    for says, (old, new, flags) in cases.items():
        config.write_text(example.replace(old, new))
        said = run("rl", "@", config, *flags, "--output-dir", tmp_path / "run", code=2)
        assert says in said
        assert len(said.strip().splitlines()) == 1, said
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"]


def test_two_values_for_one_fact_are_refused(finished, tmp_path):
    other = tmp_path / "orch.toml"
    other.write_text("max_steps = 7\n" + Path(ORCH).read_text())
    said = run("rl", "--trainer", "@", TRAIN, "--orchestrator", "@", other, "--output-dir", finished, code=2)
    assert "max_steps is 20" in said
    assert "7" in said
    assert "write this fact once" in said


def test_a_server_that_nobody_started_is_named_after_the_wait(finished, tmp_path):
    nobody = ("--orchestrator.client.base-url", "http://127.0.0.1:9", "--orchestrator.client.wait-s", "1")
    said = run("rl", *SPLIT, *SMALL, *nobody, "--output-dir", tmp_path / "run", code=2)
    assert "nobody answers at http://127.0.0.1:9 after 1 s" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_server_with_another_architecture_is_refused(server, tmp_path):
    shutil.copytree("examples/reverse_text/model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    command = (*SPLIT, *SMALL, "--model.name", tmp_path / "model", "--orchestrator.client.base-url", server)
    said = run("rl", *command, "--output-dir", tmp_path / "run", code=2)
    assert "num_hidden_layers 2" in said
    assert "num_hidden_layers 1" in said
    assert not (tmp_path / "run" / "batches").exists()


def test_every_published_byte_is_read_by_verify(finished, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    assert "0 damaged" in run("ckpt", "verify", root)
    victim = root / "batches" / "step_3" / batchlog.SAMPLES
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    assert str(victim) in run("ckpt", "verify", root, code=2)
    assert durable.read_committed(root / "batches" / "step_3") is not None  # the size alone does not show it


def test_the_row_of_a_batch_is_born_inside_it(finished):
    paths = RunPaths(finished)
    kept = [batchlog.read_metrics(paths.batch(k)) for k in range(4)]
    assert kept == metrics.read(paths.metric("orchestrator"))


@pytest.mark.slow
def test_a_damaged_batch_before_a_sound_checkpoint_does_no_harm(finished, tmp_path):
    """The checkpoint has its own copy of the orchestrator's state."""
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    victim = root / "batches" / "step_3" / batchlog.SAMPLES
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    more = ("--max-steps", "6", "--ckpt.interval", "2", "--ckpt.resume-step", "4")
    run("rl", *ALONE, "--output-dir", root, *more)
    assert [row["step"] for row in rows(root)] == list(range(1, 7))


@pytest.mark.slow
def test_a_damaged_batch_behind_the_checkpoint_begins_another_future(finished, tmp_path):
    """Nothing of the abandoned one is believed: its batches, policies and evaluations are moved aside."""
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "checkpoints" / "step_4")
    victim = root / "batches" / "step_2" / batchlog.SAMPLES
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    said = run(
        "rl",
        *ALONE,
        "--output-dir",
        root,
        "--max-steps",
        "4",
        "--ckpt.interval",
        "2",
        "--ckpt.resume-step",
        "-1",
    )
    assert "generated again" in said
    assert (root / "superseded" / "002" / "weights" / "step_4").exists()
    for step in (2, 3):
        samples, manifest = batchlog.read(RunPaths(root), step)
        assert manifest.attempt == 2
        assert max(span.step for s in samples for span in s.versions) <= step
    assert "0 skipped" in run("ckpt", "audit", root)


@pytest.mark.slow
def test_the_programs_alone_play_the_last_evaluation_too(server, tmp_path):
    """`trainer` opens the attempt, `orchestrator` joins it, and goes on after the trainer has ended."""
    base = (*SPLIT, *SMALL, "--output-dir", tmp_path / "run", "--max-steps", "3", "--ckpt")
    orchestrator = start("orchestrator", *base, "--orchestrator.client.base-url", server)
    run("trainer", *base, "--orchestrator.client.base-url", server)
    said, _ = orchestrator.communicate(timeout=60)
    assert orchestrator.returncode == 0, said
    assert list(committed(tmp_path / "run" / "evals")) == [0, 3]


@pytest.mark.campaign
def test_a_stored_policy_that_must_sample_and_is_gone_is_named(tmp_path):
    command = (*ALONE, "--deterministic", "--output-dir", tmp_path, "--launch.max-restarts", "0")
    run("rl", *command, "--max-steps", "4", "--ckpt.interval", "2")
    shutil.rmtree(tmp_path / "weights" / "step_1")
    said = run("rl", *command, "--max-steps", "4", "--ckpt.interval", "2", "--ckpt.resume-step", "2", code=1)
    assert "Policy 1, which alone may sample batch 2, is gone" in said
