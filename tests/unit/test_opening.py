"""What a start leaves behind when it is refused, and what it says of the settings that differ."""

import pytest

from ratchet import config_io
from ratchet.config import SFTConfig
from ratchet.errors import Refusal
from ratchet.launch.opening import open_attempt


def settings(root, **more):
    given = {"model": {"name": "m"}, "data": {"name": "rows.jsonl"}, "max_steps": 4, "output_dir": str(root)}
    return SFTConfig.model_validate(given | more)


def refuse(seen):
    raise Refusal("no such data")


def test_a_refused_start_leaves_nothing_where_nothing_was(tmp_path):
    root = tmp_path / "new" / "run"
    with pytest.raises(Refusal, match="no such data"):
        open_attempt("sft", settings(root), refuse)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "here").mkdir()
    with pytest.raises(Refusal):
        open_attempt("sft", settings(tmp_path / "here"), refuse)
    assert list((tmp_path / "here").iterdir()) == []
    (tmp_path / "here" / "notes.txt").write_text("mine")
    with pytest.raises(Refusal):
        open_attempt("sft", settings(tmp_path / "here"), refuse)
    assert (tmp_path / "here" / "notes.txt").read_text() == "mine"


def test_where_things_lie_is_no_other_command(tmp_path):
    one = settings(tmp_path)
    moved = settings(
        tmp_path / "x", model={"name": "n"}, data={"name": "other.jsonl"}, accept_changes=["a=b"]
    )
    assert config_io.is_same(one, moved)
    assert config_io.differences(one, settings(tmp_path, max_steps=5)) == ("max_steps: 4 -> 5",)
    assert config_io.differences(one, settings(tmp_path, ckpt={"interval": 2})) == (
        "ckpt: not given -> given",
    )
