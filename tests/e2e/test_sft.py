"""SFT as a user runs it: the real command, killed and stopped, against a run that never was."""

import json
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcp import plain_dcp
from programs import (
    ROOT,
    TINY_SFT,
    kill,
    last_step,
    processes_of,
    rows,
    run,
    run_digest,
    start,
    wait_until,
)
from ratchet import durable
from ratchet.paths import RunPaths

EXAMPLE = ("@", "examples/reverse_text/sft.toml")
SMALL = (*TINY_SFT, "--max-steps", "6")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A small run that nothing interrupts."""
    root = tmp_path_factory.mktemp("straight") / "run"
    run("sft", *SMALL, "--output-dir", root, "--ckpt.interval", "2")
    return root


def test_a_run_leaves_its_device_only_when_it_is_told_to(tmp_path):
    """A note that it computed on a GPU stands for a driver that fails for a moment."""
    root = tmp_path / "run"
    first = (*SMALL, "--output-dir", root, "--ckpt.interval", "2", "--launch.max-restarts", "0")
    at = "replace.device.json.before_rename:1"
    process = start("sft", *first, RATCHET_CRASH_AT=at, CUDA_VISIBLE_DEVICES="")
    said, _ = process.communicate()
    note = RunPaths(root).device(1, "trainer")
    assert "was killed by signal 9" in said
    assert not note.exists()
    run("sft", *first, CUDA_VISIBLE_DEVICES="")
    note = RunPaths(root).device(2, "trainer")
    note.write_text(note.read_text().replace('"cpu"', '"cuda"'))
    more = (*first, "--max-steps", "8", "--ckpt.resume-step", "-1")
    said = run("sft", *more, code=1, CUDA_VISIBLE_DEVICES="")
    assert "has computed on cuda" in said
    assert last_step(root) == 6
    run("sft", *more, "--trainer.device", "cpu")
    assert last_step(root) == 8


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(TINY_SFT, id="small"),
        pytest.param(EXAMPLE, id="as shipped", marks=pytest.mark.campaign),
    ],
)
def test_the_example_stopped_at_20_and_resumed_equals_one_run_of_40(tmp_path, example):
    command = ("sft", *example, "--output-dir")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*command, whole, "--ckpt")
    run(*command, parts, "--max-steps", "20", "--ckpt")
    said = run(*command, parts, "--max-steps", "40", "--ckpt.resume-step", "20")
    assert "Resuming at step 20" in said
    expected = plain_dcp(whole / "checkpoints" / "step_40" / "trainer")
    found = plain_dcp(parts / "checkpoints" / "step_40" / "trainer")
    assert expected.keys() == found.keys()
    assert sum(name.startswith("optimizer.") for name in expected) >= sum(
        name.startswith("model.") for name in expected
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert rows(parts) == rows(whole)
    assert len(rows(whole)) == 40
    assert rows(whole)[-1]["loss"] < 0.8 * rows(whole)[0]["loss"]


def test_the_published_model_loads_as_a_hugging_face_model(straight):
    directory = straight / "weights" / "step_6"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(
        model.model.embed_tokens.weight,
        plain_dcp(straight / "checkpoints/step_6/trainer")["model.model.embed_tokens.weight"],
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    talk = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        "<|user|>ab<|im_end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("point", "mode"),
    [
        pytest.param("checkpoint.after_shards:2", (), marks=pytest.mark.campaign),
        ("checkpoint.committed:2", ()),
        pytest.param("checkpoint.before_shards:2", ("--ckpt.save-async",), marks=pytest.mark.campaign),
        pytest.param("checkpoint.before_rename:2", ("--ckpt.save-async",), marks=pytest.mark.slow),
        pytest.param("weights.before_rename:2", ("--ckpt.save-async",), marks=pytest.mark.campaign),
    ],
)
def test_killed_inside_a_save_the_same_command_ends_with_the_same_bits(straight, tmp_path, point, mode):
    once = ("--launch.max-restarts", "0")  # the point would kill every restart as well
    command = (*SMALL, "--output-dir", tmp_path / "run", "--ckpt.interval", "2", *mode, *once)
    run("sft", *command, code=1, RATCHET_CRASH_AT=point)
    assert durable.committed(tmp_path / "run" / "checkpoints").keys() >= {2}
    said = run("sft", *command)
    assert "Continuing at step" in said
    assert run_digest(tmp_path / "run") == run_digest(straight)
    assert "complete" in run("sft", *command)


def test_kill_the_launcher_and_nothing_of_the_run_lives_on(straight, tmp_path):
    root = tmp_path / "run"
    process = start("sft", *SMALL, "--output-dir", root, "--ckpt.interval", "2")
    wait_until(lambda: last_step(root) >= 1, process=process)
    assert processes_of(root)
    kill(process)
    wait_until(lambda: not processes_of(root), timeout_s=5)
    run("sft", *SMALL, "--output-dir", root, "--ckpt.interval", "2")
    assert run_digest(root) == run_digest(straight)


@pytest.mark.campaign
def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(tmp_path):
    root, command = tmp_path / "run", (*TINY_SFT, "--ckpt")
    process = start("sft", *command, "--output-dir", root)
    wait_until(lambda: last_step(root) >= 3, process=process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    (stopped,) = durable.committed(root / "checkpoints")
    assert stopped == last_step(root) >= 3
    assert f"Continuing at step {stopped}" in run("sft", *command, "--output-dir", root)
    assert [row["step"] for row in rows(root)] == list(range(1, 41))


@pytest.mark.slow
def test_keep_last_keeps_the_newest_and_their_weights(tmp_path):
    """Also where the trainer dies between the last commit and the deletions that follow it."""
    rules = ("--ckpt.interval", "1", "--ckpt.keep-last", "2", "--ckpt.keep-interval", "3")
    command = (*SMALL, *rules, "--launch.max-restarts", "0", "--output-dir", tmp_path)
    run("sft", *command, code=1, RATCHET_CRASH_AT="checkpoint.committed:6")
    assert list(durable.committed(tmp_path / "checkpoints")) == [3, 4, 5, 6]
    run("sft", *command)
    assert list(durable.committed(tmp_path / "checkpoints")) == [3, 5, 6]
    assert list(durable.committed(tmp_path / "weights")) == [3, 5, 6]


@pytest.mark.slow
def test_with_another_batch_size_the_rows_go_on_and_a_replay_follows(tmp_path):
    """Three steps of 8 rows, three of 16 that are cut shorter; nothing else is another one."""
    root = tmp_path / "run"
    ckpt = ("--ckpt.interval", "3", "--max-steps", "6")
    command = (*EXAMPLE, "--trainer.threads", "1", "--output-dir", root, *ckpt)
    run("sft", *command, "--data.batch-size", "8")
    other = ("--data.batch-size", "16", "--data.max-length", "40")
    said = run("sft", *command, "--ckpt.resume-step", "3", *other)
    assert "data.batch_size: 8 -> 16" in said
    assert [row["progress/total_samples"] for row in rows(root)] == [8, 16, 24, 40, 56, 72]
    assert "6 rows and 2 checkpoints compared, 0 different" in run("trainer", "--replay", root)
    assert "each 0 or 1 times; 72 consumed" in run("ckpt", "audit", root)


def unusable_rows(tmp_path):
    """A model whose template refuses a critic, and 200 rows of which three cannot be trained, each in its own way."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples/reverse_text/model", model)
    template = model / "chat_template.jinja"
    no_critic = "{%- if messages[0].role == 'critic' %}{{ raise_exception('no critic') }}{%- endif %}"
    template.write_text(no_critic + template.read_text())
    rows = [{"prompt": f"{i:03d}", "completion": "ok"} for i in range(200)]
    rows[30] = {"prompt": "half \ud83d of it", "completion": "ok"}
    rows[99] = {"prompt": "a" * 3000, "completion": "ok"}
    rows[150] = {"messages": [{"role": "critic", "content": "a"}, {"role": "assistant", "content": "ok"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def test_three_unusable_rows_of_200_are_skipped_and_counted_also_across_a_kill(tmp_path):
    """Ten steps of 20 rows are one epoch."""
    model, data = unusable_rows(tmp_path)
    size = ("--max-steps", "10", "--ckpt.interval", "4", "--data.batch-size", "20", "--trainer.threads", "1")
    names = ("--model.name", model, "--data.name", data, "--launch.max-restarts", "0")
    strict = (*EXAMPLE, *size, *names, "--output-dir")
    said = run("sft", *strict, tmp_path / "refused", code=2)
    assert "3 of 200 rows cannot be trained, more than data.max_skipped 0.01 allows" in said
    for line, reason in ((31, "half a character"), (100, "max_length 2048 cuts"), (151, "no critic")):
        assert f"line {line}: " in said
        assert reason in said
    assert not (tmp_path / "refused").exists()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = (*strict[:-1], "--data.max-skipped", "0.02", "--output-dir")
    said = run("sft", *command, whole)
    assert said.count(": the row is skipped") == 3
    assert "of the first 200 rows 3 are skipped (" in said
    assert next(whole.glob("attempts/*/trainer*.log")).read_text().count(": the row is skipped") == 3
    run("sft", *command, killed, code=1, RATCHET_CRASH_AT="checkpoint.before_rename:2")
    assert "Continuing at step 4" in run("sft", *command, killed)
    assert run_digest(killed) == run_digest(whole)
    assert rows(killed) == rows(whole)
    assert sum(row.get("data/skipped", 0) for row in rows(killed)) == 3
    assert sum(row["samples"] for row in rows(killed)) == 197
    assert rows(killed)[-1]["progress/total_samples"] == 200
    audited = run("ckpt", "audit", killed)
    assert "200 rows: each 1 times; 200 consumed, 3 of them skipped, epoch 1.00" in audited
    assert "clean" in audited
    assert "10 rows and 3 checkpoints compared, 0 different" in run("trainer", "--replay", killed)


@pytest.mark.campaign
def test_a_horizon_that_follows_max_steps_is_said_aloud_when_it_moves(tmp_path):
    config = tmp_path / "sft.toml"
    config.write_text(
        (ROOT / "examples/reverse_text/sft.toml").read_text().replace("horizon_steps", "# horizon_steps")
    )
    base = ("@", config, "--output-dir", tmp_path / "run", "--data.batch-size", "16")
    run("sft", *base, "--max-steps", "2", "--ckpt")
    said = run("sft", *base, "--max-steps", "4", "--ckpt.resume-step", "2")
    assert "horizon_steps: 2 -> 4" in said


@pytest.mark.slow
def test_a_damaged_byte_in_a_checkpoint_is_found_before_it_is_used(straight, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(straight, root)
    shard = next((root / "checkpoints/step_6/trainer").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    more = (*SMALL, "--max-steps", "8", "--output-dir", root)
    said = run("sft", *more, "--ckpt.resume-step", "-1", code=2)
    assert shard.name in said
    assert "on-corrupt fallback" in said
    said = run("sft", *more, "--ckpt.resume-step", "-1", "--ckpt.on-corrupt", "fallback")
    assert "step 4" in said
    assert rows(root)[:6] == rows(straight)


@pytest.mark.slow
def test_a_poison_batch_stops_with_its_own_code_and_changes_nothing(tmp_path):
    said = run("sft", *SMALL, "--output-dir", tmp_path, "--trainer.optim.lr", "1e30", "--ckpt", code=65)
    assert "policy" in said
    assert not durable.committed(tmp_path / "checkpoints")


@pytest.mark.slow
def test_an_attempt_that_ended_before_its_first_step_binds_nothing(tmp_path):
    """A wrong value is corrected in the same directory, even one that may not change later."""
    process = start("sft", *SMALL, "--output-dir", tmp_path, "--seed", "1")
    wait_until(lambda: list(tmp_path.glob("attempts/*/record.json")), process=process)
    kill(process)
    assert last_step(tmp_path) == 0
    assert "Starting at step 0" in run("sft", *SMALL, "--output-dir", tmp_path, "--seed", "2")


@pytest.mark.slow
def test_changed_data_is_refused_and_the_corrected_name_of_a_missing_file_is_taken(tmp_path):
    data = tmp_path / "rows.jsonl"
    source = (ROOT / "examples/reverse_text/sft.jsonl").read_text().splitlines(keepends=True)
    command = (*SMALL, "--output-dir", tmp_path / "run", "--ckpt.interval", "2")
    missing = run("sft", *command, "--data.name", f"{tmp_path.name}/rows.jsonl", code=2)
    assert "cannot be read" in missing
    data.write_text("".join(source[:600]))
    run("sft", *command, "--data.name", data)
    data.write_text("".join(source[:300]))
    more = ("--max-steps", "8", "--ckpt.resume-step", "-1")
    assert "is not what it was: data (rows" in run("sft", *command, "--data.name", data, *more, code=2)
