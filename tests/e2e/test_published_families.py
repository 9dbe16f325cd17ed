"""Families that are not like the example's, in the real programs."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from test_rl import ALONE

import families
from programs import run

EXAMPLE = Path("examples/reverse_text/model")


def base_of(directory, family):
    """A model directory with the words and the chat template of the example."""
    words = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    shutil.copytree(EXAMPLE, directory)
    families.model(family, vocab_size=words).save_pretrained(directory)
    return directory


def names(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_rl_of_experts_publishes_exports_and_repeats_what_it_trained(tmp_path):
    base, root = base_of(tmp_path / "base", "glm4_moe"), tmp_path / "run"
    few = ("--max-steps", "2", "--ckpt.interval", "1", "--orchestrator.batch-size", "16")
    given = ("--model.name", base, "--model.random-init", "false")
    run("rl", *ALONE, *given, "--deterministic", *few, "--output-dir", root)
    published = root / "weights" / "step_2"
    assert names(published) == names(base)
    run("ckpt", "export", root, "2", tmp_path / "exported")
    assert (tmp_path / "exported/model.safetensors").read_bytes() == (
        published / "model.safetensors"
    ).read_bytes()
    assert "2 checkpoints compared, 0 different" in run("trainer", "--replay", root)


@pytest.mark.parametrize(
    ("command", "family", "says", "attempts"),
    [
        (("rl", *ALONE), "mamba", 'set inference.engine = "vllm"', 0),
        (("sft", "@", "examples/reverse_text/sft.toml"), "gemma2", "does not reproduce Gemma2ForCausalLM", 1),
    ],
)
def test_a_model_that_a_program_could_not_use_is_refused_in_a_sentence(
    tmp_path, command, family, says, attempts
):
    base, root = base_of(tmp_path / "base", family), tmp_path / "run"
    given = ("--model.name", base, "--model.random-init", "false")
    said = run(*command, *given, "--output-dir", root, code=2)
    assert says in said
    assert "Traceback" not in said
    assert len(list(root.glob("attempts/*"))) == attempts
