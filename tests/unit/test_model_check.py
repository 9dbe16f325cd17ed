"""A model that no program could use is refused in a sentence, before any is started."""

import json
import shutil
from pathlib import Path

import pytest

from ratchet.config import ModelConfig
from ratchet.errors import Refusal
from ratchet.models.check import check_files, check_model

EXAMPLE = Path("examples/reverse_text/model")


def check(model):
    check_files(model)
    check_model(model)


@pytest.fixture
def model(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "model")
    return ModelConfig(name=str(tmp_path / "model"), random_init=True)


def test_quantised_weights_are_for_vllm_alone(model):
    path = Path(model.name, "config.json")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(Refusal, match="holds quantised weights, which can be served by vLLM but not trained"):
        check_model(model)
    check_model(model, may_be_quantised=True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "cannot be read"), ("[]", "is not an object"), (None, "has no config.json")],
)
def test_a_directory_without_a_sound_config_is_refused(model, text, sentence):
    path = Path(model.name, "config.json")
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refusal, match=sentence):
        check(model)
