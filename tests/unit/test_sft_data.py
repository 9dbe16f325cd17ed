"""Demonstrations: every accepted form, every malformed row by file and line, an order that needs no state, and rows
that cannot be trained."""

import gzip
import json
import logging

import pytest

from ratchet.chat import Chat
from ratchet.config import DataConfig, ModelConfig
from ratchet.errors import Refusal
from ratchet.models.limits import Limits, limits_of
from ratchet.records import Progress
from ratchet.trainer import rows as metric_rows
from ratchet.trainer import sft_data, sft_files
from ratchet.trainer.sft_data import SFTSource, check_data, data_inputs
from ratchet.trainer.sft_files import load_rows
from ratchet.trainer.sft_shapes import messages_of

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
        {"messages": None, "prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": None, "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": TALK},
    ],
)
def test_every_form_of_a_row_is_the_same_conversation(row):
    assert messages_of(row, "here") == TALK


def test_alpacas_input_history_and_system_are_part_of_the_conversation():
    row = {
        "instruction": "add",
        "input": "1 2",
        "output": "3",
        "history": [["hi", "ho"]],
        "system": "be brief",
    }
    assert [(m["role"], m["content"]) for m in messages_of(row, "here")] == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "ho"),
        ("user", "add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_what_is_mapped_is_said_once(tmp_path, chat, caplog):
    with caplog.at_level(logging.INFO, "ratchet"):
        check_data(write(tmp_path, *[{"instruction": "a", "output": "b"}] * 3), chat)
    assert [m for m in caplog.messages if "Alpaca" in m] == [
        f"{tmp_path}/rows.jsonl has Alpaca's `instruction`, `input` and `output`: instruction and input are what the "
        "user says, output is the answer."
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{oops\n", "line 2 is not valid JSON"),
        ({"text": "a"}, "line 2 has neither"),
        ({"messages": [{"role": "user"}]}, "line 2: message 1: every message needs .* `content` is None"),
        ({"messages": [{"role": 7, "content": "a"}]}, "line 2: message 1: .* `role` is 7"),
        (
            {"messages": [*TALK, {"role": "user", "content": [{"text": "a"}]}]},
            "line 2: message 3: .*`content`",
        ),
        ({"messages": [*TALK, "a"]}, "line 2: message 3 must be an object"),
        ({"messages": "a"}, "line 2: `messages` must be a list of messages; it is 'a'"),
        ({"messages": None}, r"line 2 has neither .* it has \[\]"),
        (
            {"prompt": "a", "completion": 42},
            "line 2: `completion` must be a text or a list of messages; it is 42",
        ),
        ({"prompt": {"text": "a"}, "completion": "b"}, "line 2: `prompt` must be a text or a list"),
        ({"prompt": "a", "completion": None}, r"line 2 has neither .* it has \['prompt'\]"),
        ({"prompt": "a", "completion": [7]}, "line 2: message 2 must be an object"),
        ({"instruction": "a", "output": 3}, "line 2: `output` must be a text; it is 3"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "line 2: `input` must be a text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "line 2: `history` must hold pairs"),
        (
            {"conversations": [{"from": "critic", "value": "a"}]},
            "line 2: `from` must be one of .* it is 'critic'",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "line 2: `from` must be one of"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "line 2: message 1: every message needs"),
        ({"conversations": {"from": "gpt"}}, "line 2: `conversations` must be a list"),
        ('{"prompt": ' + "[" * 100000 + "\n", "line 2 is not valid JSON"),
        ('{"prompt": ' + "1" * 5000 + ', "completion": "a"}\n', "line 2 is not valid JSON"),
        ("null\n", "line 2 is not an object"),
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
    with pytest.raises(Refusal, match=r"rows\.csv is not one of \.jsonl, \.json, .*convert it"):
        load_rows(DataConfig(name=str(tmp_path / "rows.csv")))


@pytest.mark.parametrize("name", ["data/train.csv", "data/train.jsonl.gz", "data/train.json"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(sft_files, "_read_hub", lambda data: pytest.fail("asked the hub"))
    data = DataConfig(name=name)
    assert data_inputs(data) == {"data": {}}  # what refuses is the check, with its sentence
    with pytest.raises(Refusal, match=f"{name} cannot be read .there is no such file in .*check data.name"):
        load_rows(data)


def test_every_row_of_the_hub_is_checked_too(monkeypatch, chat):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 7}]
    monkeypatch.setattr(sft_files, "_read_hub", lambda data: rows)
    with pytest.raises(Refusal, match=r"someone/talks, row 2: `completion` must be a text .* it is 7"):
        check_data(DataConfig(name="someone/talks"), chat)
    monkeypatch.setattr(sft_files, "_read_hub", lambda data: [])
    with pytest.raises(Refusal, match="someone/talks has no rows"):
        check_data(DataConfig(name="someone/talks"), chat)


PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        ("rows.jsonl", b"\n" + LINES, "line 3"),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES, "line 2"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0), "line 2"),
        ("rows.json", LINES, "line 2"),
        ("rows.json", json.dumps(PAIRS, indent=2).encode(), "row 2"),
        ("rows.json.gz", gzip.compress(json.dumps(PAIRS).encode(), mtime=0), "row 2"),
    ],
)
def test_lines_and_arrays_of_json_are_read_packed_or_not_and_known_by_their_bytes(
    tmp_path, chat, name, content, second
):
    path = tmp_path / name
    path.write_bytes(content)
    data = DataConfig(name=str(path))
    rows = load_rows(data)
    assert list(rows.rows) == PAIRS
    assert rows.place(1) == f"{path}, {second}"
    check_data(data, chat)
    before = data_inputs(data)
    assert list(before["data"]) == ["rows"]
    path.write_bytes(content + b" ")
    assert data_inputs(data) != before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl.gz", LINES, "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cannot be read"),
        ("rows.jsonl", LINES + b"\xff\n", "line 3 is not UTF-8"),
        ("rows.json", b"[{]", "rows.json is not valid JSON: .*line 1 column 3"),
        ("rows.json", b"[]", "no rows"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Refusal, match=says):
        load_rows(DataConfig(name=str(path)))


def test_a_check_that_takes_long_says_how_far_it_is(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(sft_files.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "ratchet"):
        assert list(sft_files.with_progress(range(3000), 3000, "checking x")) == list(range(3000))
    assert caplog.messages == ["checking x: 1024 of 3000 rows"]


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


GOOD = {"prompt": "a", "completion": "b"}
LONG = {"prompt": "a" * 50, "completion": "b"}
HALF = {"prompt": "bad \ud83d emoji", "completion": "b"}


def unusable(tmp_path, *lines, **settings):
    return write(tmp_path, *lines).model_copy(
        update={"batch_size": 4, "max_length": 20, "shuffle": False, "max_skipped": 0.5} | settings
    )


def test_rows_that_cannot_be_trained_are_consumed_and_skipped(tmp_path, chat, caplog):
    """Six rows, of which the second and the third are skipped: 4 - 2, 4 - 0 and 4 - 2 examples, as the epochs go on."""
    data = unusable(tmp_path, GOOD, LONG, HALF, GOOD, GOOD, GOOD)
    source, progress, found = SFTSource(data, chat, seed=0), Progress(), []
    for _ in range(3):
        batch = source.read(progress)
        metric_rows.advance(progress, batch)
        found.append((len(batch.examples), batch.skipped, progress.total_samples, progress.total_skipped))
    assert found == [(2, 2, 4, 2), (3, 1, 8, 3), (3, 1, 12, 4)]
    assert [m for m in caplog.messages if "skipped" in m] == [
        f"{data.name}, line 2: no token to learn: data.max_length 20 cuts the answer away: the row is skipped",
        f"{data.name}, line 3: The text has half a character (a lone surrogate, such as \\ud83d), of which "
        "there are no tokens: the row is skipped",
    ]
    resumed = SFTSource(data, chat, seed=0).read(Progress(step=2, total_samples=8, total_skipped=3))
    assert (len(resumed.examples), resumed.skipped) == (3, 1)


def test_a_batch_without_a_usable_row_goes_on_to_the_next_rows(tmp_path, chat):
    data = unusable(tmp_path, GOOD, LONG, LONG, GOOD, batch_size=1)
    source, progress, consumed = SFTSource(data, chat, seed=0), Progress(), []
    for _ in range(3):
        metric_rows.advance(progress, source.read(progress))
        consumed.append(progress.total_samples)
    assert consumed == [1, 4, 5]


def refuses_to_begin_with_an_answer():
    """A template as many models have one, that marks nothing itself and drops what was thought before."""
    template = (
        "{%- for m in messages %}{%- if loop.first and m.role == 'assistant' %}{{ raise_exception('user first') }}"
        "{%- endif %}<|{{ m.role }}|>"
        "{{ m.content.split('!')[-1] if not loop.last else m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
    )
    plain = Chat.load("examples/reverse_text/model")
    return Chat(plain._tokenizer, template, {}, [], "mine")


def test_what_only_the_template_knows_is_a_reason_too(tmp_path):
    chat = refuses_to_begin_with_an_answer()
    thought = [*TALK[:1], {"role": "assistant", "content": "hm!b"}, *TALK]
    data = unusable(tmp_path, GOOD, {"messages": TALK[::-1]}, {"messages": thought}, GOOD, max_skipped=0.4)
    with pytest.raises(Refusal) as caught:
        check_data(data, chat)
    said = str(caught.value)
    assert "2 of 4 rows cannot be trained, more than data.max_skipped 0.4 allows" in said
    assert said.startswith(f"{data.name}: 2 of 4 rows")
    assert "(line 2: The chat template of mine refuses these messages: user first;" in said
    assert "; line 3: The chat template of mine rewrites earlier turns" in said
    assert said.endswith("Correct them, or set data.max_skipped to 0.5 to do without them.")
    check_data(data.model_copy(update={"max_skipped": 0.5}), chat)


def test_sequences_that_the_model_cannot_take_in_are_skipped(tmp_path, chat):
    """`<|user|>ab<|im_end|><|assistant|>b<|im_end|>` is 7 tokens, 6 inputs; ids go up to the highest that it holds."""
    ids, _ = chat.render_training(messages_of({"prompt": "ab", "completion": "b"}, "here"))
    assert len(ids) == 7
    data = unusable(tmp_path, {"prompt": "ab", "completion": "b"}, max_skipped=0)
    for fits in (Limits(positions=6), Limits(vocabulary=max(ids) + 1), Limits()):
        check_data(data, chat, limits=fits)
    with pytest.raises(Refusal, match=r"longer than the model's 5 positions: data.max_length 6 would"):
        check_data(data, chat, limits=Limits(positions=5))
    with pytest.raises(Refusal, match="a token that is none of the model's"):
        check_data(data, chat, limits=Limits(vocabulary=max(ids)))


@pytest.mark.parametrize(
    ("stated", "limits"),
    [
        ({"model_type": "gpt2", "vocab_size": 64, "n_positions": 32}, Limits(64, 32)),
        ({"model_type": "opt", "vocab_size": 64, "max_position_embeddings": 32}, Limits(64, 32)),
        ({"model_type": "mpt", "vocab_size": 64, "max_seq_len": 32}, Limits(64, 32)),
        ({"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 32}, Limits(64)),
        ({"text_config": {"model_type": "gemma3_text", "vocab_size": 64}, "vocab_size": 7}, Limits(64)),
    ],
)
def test_a_model_states_its_vocabulary_and_the_length_of_its_table_of_positions(tmp_path, stated, limits):
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert limits_of(ModelConfig(name=str(tmp_path))) == limits


def test_the_share_is_of_all_rows_of_a_small_file_and_of_512_or_what_was_consumed_of_a_large_one(
    tmp_path, chat
):
    """1 % of 200 rows are 2. Of 2000 rows the first 512 allow 5, 604 allow 6 and 704 allow 7."""
    few = unusable(tmp_path, *[GOOD] * 197, LONG, LONG, GOOD, max_skipped=0.01)
    check_data(few, chat)
    with pytest.raises(Refusal, match=r"3 of 200 rows .* to 0.02 to do"):
        check_data(unusable(tmp_path, *[GOOD] * 197, LONG, LONG, LONG, max_skipped=0.01), chat)
    many = unusable(tmp_path, *[LONG] * 5, *[GOOD] * 595, *[LONG] * 2, *[GOOD] * 1398, max_skipped=0.01)
    check_data(many, chat)
    source = SFTSource(many, chat, seed=0)
    with pytest.raises(Refusal, match="7 of 604 rows cannot be trained"):
        source.read(Progress(step=150, total_samples=600, total_skipped=5))
    later = Progress(step=175, total_samples=700, total_skipped=7)
    assert len(source.read(later).examples) == 4
    with pytest.raises(Refusal, match="6 of 512 rows"):
        check_data(unusable(tmp_path, *[LONG] * 6, *[GOOD] * 1994, max_skipped=0.01), chat)


def test_many_skipped_rows_are_a_few_lines_in_the_log(tmp_path, chat, caplog):
    data = unusable(tmp_path, *[LONG] * 40, *[GOOD] * 40, batch_size=80)
    SFTSource(data, chat, seed=0, is_heard=False).read(Progress())
    assert caplog.messages == []
    SFTSource(data, chat, seed=0).read(Progress())
    assert ["so far" in m for m in caplog.messages] == [False] * 5 + [True] * 3
    assert "so far 32 are skipped (32 of no token to learn" in caplog.messages[-1]


def test_data_of_which_no_row_can_be_trained_is_refused_whatever_is_allowed(tmp_path, chat):
    data = unusable(tmp_path, LONG, HALF, max_skipped=1.0)
    for use in (lambda: check_data(data, chat), lambda: SFTSource(data, chat, seed=0).read(Progress())):
        with pytest.raises(Refusal, match=r"none of the 2 rows can be trained .*max_length 20 cuts"):
            use()
