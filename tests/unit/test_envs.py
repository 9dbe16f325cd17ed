"""Environments: what they ask, how they score, and the sentences for what is wrong with them."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from ratchet.config import EnvConfig
from ratchet.envs import registry
from ratchet.envs.base import Transcript, settle
from ratchet.errors import Refusal


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(name, **args):
    return registry.build(EnvConfig(id=name, args=args))


def score(env, completion, index=0):
    task = env.task(index, "train")
    messages = (*env.messages(task), {"role": "assistant", "content": completion})
    return env.step(task, Transcript(messages, "stop"))


def test_reverse_text_asks_the_text_and_rewards_its_reverse(here):
    write(here / "train.jsonl", [{"text": "abcd"}])
    write(here / "eval.jsonl", [{"text": "xy"}, {"text": "yz"}])
    env = build("reverse_text", data="train.jsonl", eval_data="eval.jsonl")
    assert (env.size, env.eval_size) == (1, 2)
    assert env.messages(env.task(0, "train")) == [{"role": "user", "content": "abcd"}]
    assert env.task(1, "eval").id == "eval/1"
    assert score(env, "dcba").reward == 1.0
    # "dc" of "dcba": 2 matches * 2 / (2 + 4 characters).
    assert score(env, "dc").reward == pytest.approx(4 / 6)
    assert score(env, "dcba").metrics == {"refused": 0.0, "answered_reward": 1.0}


def test_a_refused_answer_counts_as_refused_and_not_as_answered(here):
    write(here / "train.jsonl", [{"text": "abcd"}])
    env = build("reverse_text", data="train.jsonl")
    assert score(env, "i do not know").metrics == {"refused": 1.0}


def test_a_system_prompt_comes_first(here):
    write(here / "train.jsonl", [{"text": "abcd"}])
    env = build("reverse_text", data="train.jsonl", system="be brief")
    assert [m["role"] for m in env.messages(env.task(0, "train"))] == ["system", "user"]


def test_rows_are_scored_by_a_function_of_the_user(here):
    (here / "my_reward.py").write_text(
        "def exact(completion, row):\n"
        "    return {'reward': float(completion == row['answer']), 'length': len(completion)}\n"
    )
    write(here / "train.jsonl", [{"prompt": "1+1?", "answer": "2"}])
    env = build("rows", data="train.jsonl", reward="my_reward:exact")
    assert env.messages(env.task(0, "train")) == [{"role": "user", "content": "1+1?"}]
    assert score(env, "2") == type(score(env, "2"))(1.0, {"length": 1.0})
    assert score(env, "no").reward == 0.0


def test_rows_of_messages_leave_the_demonstrated_answer_out(here):
    (here / "plain_reward.py").write_text("def one(completion, row):\n    return 1\n")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    write(here / "train.jsonl", [{"messages": messages}])
    env = build("rows", data="train.jsonl", reward="plain_reward:one")
    assert env.messages(env.task(0, "train")) == messages[:1]
    assert score(env, "x").reward == 1.0


def test_parquet_rows_read_like_jsonl_rows(here):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "ab"}, {"text": ""}]), here / "t.parquet")
    with pytest.raises(Refusal, match=r"t.parquet, row 2: `text` must be a non-empty text"):
        build("reverse_text", data="t.parquet")


def test_a_malformed_row_is_refused_with_file_and_line(here):
    (here / "train.jsonl").write_text('{"text": "ab"}\n\n{"txt": "cd"}\n')
    with pytest.raises(Refusal, match=r"train.jsonl, line 3: `text` must be a non-empty text; it is missing"):
        build("reverse_text", data="train.jsonl")
    (here / "train.jsonl").write_text('{"text": "ab"}\n{"text": \n')
    with pytest.raises(Refusal, match=r"train.jsonl, line 2: not valid JSON"):
        build("reverse_text", data="train.jsonl")


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("revers_text", {}, "no environment 'revers_text'; built in are reverse_text, rows"),
        ("nowhere:Env", {}, "no module 'nowhere'"),
        ("json:Env", {}, "module json has no 'Env'"),
        ("json:JSONDecoder", {}, "not a subclass"),
        ("ratchet.envs.base:Environment", {}, "does not define messages, size, step, task"),
        ("reverse_text", {"data": "gone.jsonl"}, "no data file gone.jsonl"),
        ("reverse_text", {}, "missing a required .*argument: 'data'"),
        ("reverse_text", {"data": "train.jsonl", "dta": 1}, "unexpected keyword argument 'dta'"),
        ("rows", {"data": "train.jsonl", "reward": "json"}, "must have the form module:name"),
        ("reverse_text", {"data": "empty.jsonl"}, "empty.jsonl has no rows"),
        ("reverse_text", {"data": "data.csv"}, "neither .jsonl nor .parquet"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(here, name, args, sentence):
    write(here / "train.jsonl", [{"prompt": "ab", "text": "ab"}])
    (here / "empty.jsonl").write_text("")
    (here / "data.csv").write_text("a,b\n")
    with pytest.raises(Refusal, match=sentence):
        build(name, **args)


def test_a_class_of_the_user_is_found_in_the_working_directory(here):
    (here / "my_env.py").write_text(
        "from ratchet.envs.base import Environment, Score, Task\n"
        "class Echo(Environment):\n"
        "    def __init__(self, count): self.count = count\n"
        "    @property\n"
        "    def size(self): return self.count\n"
        "    def task(self, index, split): return Task(str(index))\n"
        "    def messages(self, task): return [{'role': 'user', 'content': task.id}]\n"
        "    def step(self, task, transcript): return Score(1.0)\n"
    )
    assert build("my_env:Echo", count=3).size == 3
    with pytest.raises(Refusal, match="no training tasks"):
        build("my_env:Echo", count=0)


def test_the_built_in_environments_declare_the_files_that_they_read(here):
    write(here / "train.jsonl", [{"text": "abcd"}])
    write(here / "eval.jsonl", [{"text": "abc"}])
    assert list(build("reverse_text", data="train.jsonl").inputs) == ["train.jsonl"]
    both = build("reverse_text", data="train.jsonl", eval_data="eval.jsonl")
    assert list(both.inputs) == ["train.jsonl", "eval.jsonl"]


BROKEN = {
    "syntax": ("def reward(completion, row):\n    return (\n", r"SyntaxError.*mine\.py, line 2"),
    "variable": (
        "import os\nKEY = os.environ['NO_SUCH_KEY']\n",
        r"KeyError: 'NO_SUCH_KEY'.*mine\.py, line 2",
    ),
    "import": ("import no_such_module\n", r"No module named 'no_such_module'.*mine\.py, line 1"),
    "signature": (
        "def reward(completions, prompts, answer):\n    return [1.0]\n",
        r"takes \(completions, prompts, answer\), but is called with \(completion, row\)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_error_that_cannot_heal_is_said_at_the_start_with_the_users_lines_alone(here, kind):
    text, sentence = BROKEN[kind]
    write(here / "train.jsonl", [{"prompt": "abcd"}])
    (here / f"mine_{kind}.py").write_text(text)
    with pytest.raises(Refusal, match=re.compile(sentence.replace("mine", f"mine_{kind}"), re.S)) as caught:
        build("rows", data="train.jsonl", reward=f"mine_{kind}:reward")
    assert "ratchet" not in str(caught.value)


async def test_a_reward_may_be_a_coroutine(here):
    write(here / "train.jsonl", [{"prompt": "abcd"}])
    (here / "mine_async.py").write_text(
        "import asyncio\nasync def reward(completion, row):\n    await asyncio.sleep(0)\n"
        "    return {'reward': len(completion), 'seen': 1}\n"
    )
    env = build("rows", data="train.jsonl", reward="mine_async:reward")
    found = await settle(score(env, "abc"))
    assert (found.reward, found.metrics) == (3.0, {"seen": 1.0})


def test_an_environment_whose_constructor_fails_is_refused(here):
    (here / "mine_class.py").write_text(
        "from ratchet.envs.base import Environment\n"
        "class Mine(Environment):\n"
        "    def __init__(self):\n        raise OSError('the judge is not there')\n"
        "    size = 1\n    def task(self, index, split): ...\n"
        "    def messages(self, task): ...\n    def step(self, task, transcript): ...\n"
    )
    with pytest.raises(
        Refusal, match=r"(?s)Environment Mine fails: OSError: the judge is not there.*line 4, in __init__"
    ):
        build("mine_class:Mine")
