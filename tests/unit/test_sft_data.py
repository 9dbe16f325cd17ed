"""Demonstrations: every accepted form, every malformed row by file and line, an order that needs no state."""

import json

import pytest

from ratchet.chat import Chat
from ratchet.config import DataConfig
from ratchet.errors import Refusal
from ratchet.records import Progress
from ratchet.trainer import sft_data
from ratchet.trainer.sft_data import SFTSource, check_data, load_rows, messages_of

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def chat():
    return Chat.load("examples/reverse_text/model")


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return DataConfig(name=str(path), batch_size=4)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": "a", "completion": "b"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
    ],
)
def test_the_three_forms_of_a_row_are_the_same_conversation(row):
    assert messages_of(row, "here") == TALK


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{oops\n", "line 2 is not valid JSON"),
        ({"text": "a"}, "line 2 has neither"),
        ({"messages": [{"role": "user"}]}, "line 2: every message needs"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2 has no assistant message"),
        ([1], "line 2 is not an object"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, chat, bad, says):
    data = write(tmp_path, {"messages": TALK}, bad)
    with pytest.raises(Refusal, match=says) as caught:
        check_data(data, chat)
    assert data.name in str(caught.value)


def test_missing_empty_and_unknown_files_are_refused(tmp_path, chat):
    with pytest.raises(Refusal, match="cannot be read"):
        load_rows(DataConfig(name=str(tmp_path / "none.jsonl")))
    with pytest.raises(Refusal, match="no rows"):
        load_rows(write(tmp_path))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(Refusal, match=r"not a \.jsonl or \.parquet"):
        load_rows(DataConfig(name=str(tmp_path / "rows.csv")))


def test_parquet_rows_are_read(tmp_path, chat):
    from pyarrow import Table, parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"prompt": "a", "completion": "b"}]), path)
    data = DataConfig(name=str(path), batch_size=1)
    check_data(data, chat)
    assert SFTSource(data, chat, seed=0).read(Progress()).trained_tokens == 2


def after(step):
    """So many batches of four rows."""
    return Progress(step=step, total_samples=4 * step)


def rows_of(source, step, chat):
    return [chat.decode(e.token_ids, skip_special_tokens=True) for e in source.read(after(step)).examples]


def test_every_epoch_holds_every_row_once_in_another_order(tmp_path, chat):
    words = ["aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh"]
    data = write(tmp_path, *({"prompt": w, "completion": w} for w in words))
    source = SFTSource(data, chat, seed=3)
    epochs = [rows_of(source, k, chat) + rows_of(source, k + 1, chat) for k in (0, 2, 4)]
    for epoch in epochs:
        assert sorted(epoch) == [w + w for w in words]
    assert epochs[0] != epochs[1]


def test_batch_k_is_the_same_whoever_asks_and_whenever(tmp_path, chat):
    data = write(tmp_path, *({"prompt": f"p{i}", "completion": "x"} for i in range(10)))
    first = SFTSource(data, chat, seed=3)
    history = [first.read(after(k)) for k in range(6)]
    assert SFTSource(data, chat, seed=3).read(after(5)) == history[5]
    assert SFTSource(data, chat, seed=4).read(after(5)) != history[5]


@pytest.mark.parametrize(("room", "least", "most"), [(0, 40, 40), (30, 11, 39), (10**6, 10, 10)])
def test_rows_are_rendered_again_only_where_there_is_no_room_for_them(
    tmp_path, chat, monkeypatch, room, least, most
):
    data = write(tmp_path, *({"prompt": f"p{i}", "completion": "x"} for i in range(10)))
    monkeypatch.setattr(sft_data, "TOKENS_KEPT", 10**6)
    plain = [
        SFTSource(data, chat, seed=3).read(after(k)) for k in range(10)
    ]  # a source each: nothing is kept
    monkeypatch.setattr(sft_data, "TOKENS_KEPT", room)
    source, rendered = SFTSource(data, chat, seed=3), []
    render = chat.render_training
    monkeypatch.setattr(chat, "render_training", lambda messages: rendered.append(1) or render(messages))
    assert [source.read(after(k)) for k in range(10)] == plain
    assert least <= len(rendered) <= most


def test_a_batch_whose_answers_are_all_cut_away_is_refused(tmp_path, chat):
    data = write(tmp_path, {"prompt": "a long question", "completion": "b"}).model_copy(
        update={"max_length": 5}
    )
    with pytest.raises(Refusal, match="max_length"):
        SFTSource(data, chat, seed=0).read(Progress())
