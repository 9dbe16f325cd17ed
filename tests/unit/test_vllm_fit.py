"""What a vLLM that a user runs lacks, from its own words."""

import json

import pytest

from ratchet.orchestrator.vllm_fit import misfit

FITS = {
    "engine": "vllm 0.32.0",
    "weight_version": "default",
    "weight_transfer": "ratchet",
    "logprobs_mode": "processed_logprobs",
    "sampling_defaults": {},
    "scale_out": True,
}


def of(info, version="0.32.0"):
    return misfit(json.dumps(info).encode(), json.dumps({"version": version}).encode())


def test_a_vllm_with_everything_fits_and_so_does_what_is_no_vllm():
    assert of(FITS) is None
    assert of(FITS, "0.33.1.dev2+gabc") is None
    assert misfit(b'{"weight_version": "a"}', None) is None
    assert misfit(None, None) is None


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"scale_out": False}, "--enable-scale-out"),
        ({"weight_transfer": None}, '--weight-transfer-config \'{"backend": "ratchet"}\''),
        ({"weight_transfer": "nccl"}, '--weight-transfer-config \'{"backend": "ratchet"}\''),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"sampling_defaults": {"top_p": 0.9}}, "--generation-config vllm"),
    ],
)
def test_the_argument_that_is_missing_is_named_alone(change, argument):
    expected = f"is vLLM 0.32.0 without {argument}: start it with that (docs/scaling.md)."
    assert of(FITS | change) == expected


def test_two_missing_arguments_are_named_together():
    found = of(FITS | {"scale_out": False, "logprobs_mode": "raw_logprobs"})
    assert found is not None
    assert "without --enable-scale-out --logprobs-mode processed_logprobs: " in found


@pytest.mark.parametrize("info", [None, b'{"weight_version": "default"}', b"<html>"])
def test_a_vllm_without_our_middleware_is_told_every_argument(info):
    found = misfit(info, b'{"version": "0.32.0"}')
    assert found is not None
    for argument in (
        "--middleware ratchet.inference.vllm.front.Front",
        "--enable-scale-out",
        "--generation-",
    ):
        assert argument in found


def test_an_older_vllm_is_refused_by_its_version():
    found = of(FITS, "0.31.2")
    assert found is not None
    assert found.startswith("is vLLM 0.31.2: 0.32 is the first")
