"""The table of what the embedded server takes is that of the code."""

import re
from pathlib import Path

import msgspec
import pytest

from ratchet.errors import Refusal
from ratchet.inference import wire
from ratchet.inference.completions import MOST_CHOICES

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
SECTION = PAGE.partition("## The embedded server's protocol")[2].partition("\n## ")[0]
ROWS = {
    cells[0].strip(): cells[1:]
    for line in SECTION.splitlines()
    if line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) == 4
}
COLUMNS = [wire.ChatRequest, wire.CompletionRequest, wire.SamplingParams]


def named(row, column):
    return set(re.findall(r"`(\w+)`", ROWS[row][column]))


@pytest.mark.parametrize(("column", "shape"), list(enumerate(COLUMNS)))
def test_every_field_that_is_taken_is_in_the_table_and_no_other(column, shape):
    own = {"messages", "prompt", "token_ids", "model"} - {"sampling_params"}
    found = set().union(*(named(row, column) for row in ("sampling", "answer", "stream")))
    assert found - {"include_usage", "sampling_params"} == {*shape.__struct_fields__} - own


def test_every_neutral_value_of_the_table_is_taken_and_no_other():
    said = dict(re.findall(r"`(\w+)` ([^,`]+)", ROWS["only as here, where it changes nothing"][0]))
    assert {*said, "stream"} == set(wire.NEUTRAL)
    values = {"none or auto": "auto", "text": {"type": "text"}, "-1 or 0": -1}
    for name, text in said.items():
        value = values[text.strip()] if text.strip() in values else msgspec.json.decode(text)
        body = msgspec.json.encode({"token_ids": [5], "sampling_params": {name: value}})
        assert wire.parse(wire.GenerateRequest, body).token_ids == [5]
        odd = msgspec.json.encode({"token_ids": [5], "sampling_params": {name: "odd"}})
        with pytest.raises(Refusal, match=f"{name} = 'odd' is not supported"):
            wire.parse(wire.GenerateRequest, odd)


def test_every_field_of_the_table_that_is_ignored_is_and_no_other():
    assert named("ignored", 0) == wire.IGNORED
    body = msgspec.json.encode({"token_ids": [5], **dict.fromkeys(wire.IGNORED, "odd"), "beam": None})
    assert wire.parse(wire.GenerateRequest, body).token_ids == [5]


def test_the_bounds_of_the_table_are_those_of_the_code():
    assert f"{MOST_CHOICES} choices at most" in SECTION
    assert f"at least {wire.LOWEST_TEMPERATURE:g}" in SECTION
