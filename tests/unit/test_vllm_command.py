"""From a configuration to vLLM's command line, and what is refused on the way."""

import json
import shutil

import pytest

from ratchet.config import RLConfig
from ratchet.errors import Refusal
from ratchet.inference.vllm import command
from ratchet.orchestrator import vllm_fit

MODEL = "examples/reverse_text/model"


def config(vllm=None, model=None, **inference):
    given = {"engine": "vllm", "vllm": vllm or {}} | inference
    settings = {"model": {"name": MODEL} | (model or {}), "max_steps": 2, "inference": given}
    return RLConfig.model_validate(settings)


def pairs(arguments):
    """Options with their values; a flag has None."""
    found = {}
    for i, word in enumerate(arguments):
        if word.startswith("--"):
            after = arguments[i + 1] if i + 1 < len(arguments) else "--"
            found[word] = None if after.startswith("--") else after
    return found


def test_the_settings_of_inference_in_vllms_words():
    found = pairs(command.arguments(config(max_model_len=64, slots=8, dtype="bfloat16")))
    expected = {
        "--model": MODEL,
        "--served-model-name": MODEL,
        "--max-model-len": "64",
        "--max-num-seqs": "8",
        "--dtype": "bfloat16",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--enable-scale-out": None,
    }
    assert {key: found[key] for key in expected} == expected
    assert json.loads(found["--weight-transfer-config"]) == {"backend": "ratchet"}
    assert "--load-format" not in found


def test_a_server_of_ours_has_what_a_users_own_is_asked_for():
    found = pairs(command.arguments(config()))
    said = vllm_fit.misfit(None, b'{"version": "0.32.0"}')
    assert said is not None
    asked = {word for word in said.split() if word.startswith("--")}
    assert len(asked) == 5
    assert asked <= set(found)


def test_other_settings_are_passed_on_in_vllms_spelling():
    extra = {
        "tensor_parallel_size": 2,
        "enable-prefix-caching": False,
        "enforce_eager": True,
        "compilation_config": {"level": 3},
    }
    expected = ["--tensor-parallel-size", "2", "--no-enable-prefix-caching", "--enforce-eager"]
    assert command.passed_on(extra) == [*expected, "--compilation-config", '{"level": 3}']


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("max_model_len", "set inference.max_model_len instead"),
        ("max-num-seqs", "set inference.slots instead"),
        ("logprobs_mode", "leave it out"),
        ("override_generation_config", "leave it out"),
    ],
)
def test_what_this_program_decides_is_not_passed_on(key, remedy):
    with pytest.raises(Refusal, match=rf"inference\.vllm\.{key} is decided by Ratchet: {remedy}"):
        command.arguments(config({key: "x"}))


def test_vllm_is_given_no_more_positions_than_the_model_knows(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 40}))
    found = pairs(command.arguments(config(model={"name": str(directory)}, max_model_len=64)))
    assert found["--max-model-len"] == "40"


def interpreter(directory, version, has_plugin):
    """An executable that answers as the interpreter of an environment with this vLLM would."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps([version, has_plugin])}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "has_plugin", "says"),
    [
        (None, False, "has no vLLM. `examples/vllm/build_env.sh DIR` builds"),
        ("0.31.9", True, "has vLLM 0.31.9: 0.32 is the first"),
        ("0.32.0", False, "but not this package"),
    ],
)
def test_an_environment_that_cannot_serve_is_refused(tmp_path, version, has_plugin, says):
    python = interpreter(tmp_path, version, has_plugin)
    with pytest.raises(Refusal, match=says.replace(".", r"\.")):
        command.check(config({"python": str(python)}))


def test_an_environment_that_can_serve_passes(tmp_path):
    command.check(config({"python": str(interpreter(tmp_path, "0.32.0", True))}))


@pytest.mark.parametrize(("is_invariant", "warnings"), [(False, 1), (True, 0)])
def test_deterministic_is_said_not_to_cover_every_bit(tmp_path, monkeypatch, caplog, is_invariant, warnings):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1" if is_invariant else "0")
    settings = config({"python": str(interpreter(tmp_path, "0.32.0", True))}, max_model_len=64)
    with caplog.at_level("WARNING", logger="ratchet"):
        command.check(settings)
        assert not caplog.records
        command.check(settings.model_copy(update={"deterministic": True}))
    assert [record.getMessage() for record in caplog.records] == [command.NOT_BITWISE] * warnings


def test_what_is_no_interpreter_is_refused(tmp_path):
    with pytest.raises(Refusal, match="does not run as a Python interpreter"):
        command.check(config({"python": str(tmp_path / "none")}))
