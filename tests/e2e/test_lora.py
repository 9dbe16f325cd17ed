"""LoRA as a user runs it: killed and continued, published merged, exported; SFT and RL."""

import json
import signal

import pytest
from safetensors import safe_open

from programs import TINY_SFT, last_step, processes_of, rows, run, run_digest, start, wait_until
from ratchet import durable

LORA = (
    *("--model.lora.rank", "4", "--model.lora.dropout", "0.1"),
    *("--model.lora.target-modules", '["q_proj", "v_proj", "up_proj"]'),
)
SFT = (*TINY_SFT, "--max-steps", "6", *LORA)
RL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model", *LORA),
    *("--model.random-init", "--inference.slots", "16", "--deterministic", "--max-steps", "6"),
    *("--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8", "--ckpt.interval", "2"),
)


@pytest.mark.slow
def test_adapters_killed_inside_a_save_end_with_the_same_bits_and_come_out_whole(tmp_path):
    calm, root = tmp_path / "calm", tmp_path / "run"
    run("sft", *SFT, "--output-dir", calm, "--ckpt.interval", "2")
    command = (*SFT, "--ckpt.interval", "2", "--launch.max-restarts", "0", "--output-dir", root)
    run("sft", *command, code=1, RATCHET_CRASH_AT="checkpoint.after_shards:2")
    said = run("sft", *command)
    assert "Continuing at step 2" in said
    assert run_digest(root) == run_digest(calm)
    assert rows(root)[-1]["loss"] < rows(root)[0]["loss"]

    schema = durable.read_manifest(root / "checkpoints/step_6").meta["schema"]
    assert all(".lora_" in name for name in schema)
    run("ckpt", "export", root, "6", tmp_path / "merged", "--merge")
    for path in (tmp_path / "merged").iterdir():
        assert path.read_bytes() == (root / "weights/step_6" / path.name).read_bytes(), path.name
    run("ckpt", "export", root, "6", tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * 3 * 2
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"

    other = (*command, "--max-steps", "8", "--ckpt.resume-step", "-1")
    assert "model.lora.rank: 4 -> 8" in run("sft", *other, "--model.lora.rank", "8", code=2)


@pytest.mark.campaign
def test_rl_of_adapters_killed_and_continued_ends_with_the_same_bits(tmp_path):
    calm, root = tmp_path / "calm", tmp_path / "run"
    run("rl", *RL, "--output-dir", calm)
    process = start("rl", *RL, "--output-dir", root)
    wait_until(lambda: last_step(root) >= 3, process=process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not processes_of(root))
    run("rl", *RL, "--output-dir", root)
    assert run_digest(root) == run_digest(calm)
    assert "0 different" in run("trainer", "--replay", root)
