"""What is refused before a run starts, and which policies are evaluated."""

import http.server
import json
import shutil
import socket
import threading
from pathlib import Path

import pytest

from ratchet.config import EvalConfig, RLConfig
from ratchet.errors import Refusal
from ratchet.inference.wire import sampling_params
from ratchet.inputs.seen import Seen
from ratchet.inputs.tree import Inputs
from ratchet.orchestrator.batches import credited, exact_row
from ratchet.orchestrator.check import check, probe
from ratchet.orchestrator.evals import mean_metrics
from ratchet.orchestrator.scheduler import Batch, Group
from ratchet.records import Progress, Sample, VersionSpan

MODEL = Path(__file__).parents[2] / "examples" / "reverse_text" / "model"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "short"}, {"text": "a longer text"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_broken.py").write_text(
        "from ratchet.envs.base import Environment, Task\n"
        "class Broken(Environment):\n"
        "    size = 3\n"
        "    def task(self, index, split): return Task(str(index))\n"
        "    async def messages(self, task): return [{'role': 'user', 'content': 'x'}][int(task.id):]\n"
        "    def step(self, task, transcript): ...\n"
        "class Raises(Broken):\n"
        "    def messages(self, task): raise KeyError('question')\n"
    )
    return tmp_path


def config(env=None, **more):
    env = {"id": "reverse_text", "args": {"data": "train.jsonl"}} if env is None else env
    orchestrator = {"env": [env] if env else [], "batch_size": 4, "group_size": 2} | more.pop(
        "orchestrator", {}
    )
    given = {"model": {"name": str(MODEL)}, "max_steps": 2, "orchestrator": orchestrator} | more
    return RLConfig.model_validate(given)


def test_a_sound_configuration_passes(here):
    check(config(), Seen(Inputs()))
    check(config(inference={}), Seen(Inputs()))


# "<|user|>a longer text<|im_end|><|assistant|>": 1 + 13 + 1 + 1 = 16 tokens.
@pytest.mark.parametrize(("limit", "room"), [(36, 20), (35, 19), (17, 1), (16, 0)])
def test_the_longest_prompt_must_leave_room_for_an_answer(here, caplog, limit, room):
    tried = config(inference={"max_model_len": limit}, orchestrator={"sampling": {"max_tokens": 20}})
    if room:
        check(tried, Seen(Inputs()))
        said = f"Task train/1 of environment reverse_text has a prompt of 16 tokens: an answer has room for {room} in"
        assert (said in caplog.text) == (room < 20)
    else:
        with pytest.raises(Refusal, match=r"Task train/1 .* prompt of 16 tokens.*no room.*max_model_len 16"):
            check(tried, Seen(Inputs()))


# The longest prompt has the letters of "a longer text"; the highest token is that of "x".
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_position_embeddings": 16}, "no room for an answer in the model's max_position_embeddings 16"),
        ({"max_position_embeddings": 17}, None),
        ({"vocab_size": 31}, "has token 31 in its prompt, and the model knows 31: .* model.tokenizer"),
        ({"vocab_size": 32}, None),
    ],
)
def test_prompts_must_be_of_tokens_and_positions_that_the_model_knows(here, changes, sentence):
    shutil.copytree(MODEL, here / "model")
    stated = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps(stated | changes))
    tried = config(inference={}, model={"name": str(here / "model")})
    if sentence is None:
        check(tried, Seen(Inputs()))
    else:
        with pytest.raises(Refusal, match=sentence):
            check(tried, Seen(Inputs()))


@pytest.mark.parametrize(
    ("env", "more", "sentence"),
    [
        ({}, {}, "needs an environment"),
        ({"id": "nothing"}, {}, "no environment 'nothing'"),
        (None, {"max_async_level": 3, "max_off_policy_steps": 2}, "below max_async_level 3"),
        (None, {"orchestrator": {"eval": {}}}, "no held-out tasks"),
        ({"id": "reverse_text", "name": "a/b", "args": {"data": "train.jsonl"}}, {}, "becomes a file name"),
        ({"id": "my_broken:Raises"}, {"inference": {}}, r"fails on train task 0 \(KeyError\('question'\)\)"),
    ],
)
def test_what_no_orchestrator_could_run_is_refused(here, env, more, sentence):
    with pytest.raises(Refusal, match=sentence):
        check(config(env, **more), Seen(Inputs()))


class Server(http.server.BaseHTTPRequestHandler):
    answers = {}

    def do_GET(self):
        answer = self.answers.get(self.path)
        self.send_response(404 if answer is None else 200)
        self.end_headers()
        self.wfile.write(answer or b"")

    def log_message(self, *arguments): ...


@pytest.fixture
def answers():
    class Own(Server):
        answers = {
            "/health": b"",
            "/v1/models": b'{"data": [{"id": "m"}]}',
            "/weight_info": b'{"weight_version": "default"}',
        }

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Own.answers["url"] = f"http://127.0.0.1:{server.server_address[1]}/"
    yield Own.answers
    server.shutdown()
    server.server_close()


def probing(url, wait_s=0.3, **more):
    return config(orchestrator={"client": {"base_url": url, "wait_s": wait_s}}, **more)


def test_nobody_answering_is_refused_with_the_address_and_the_remedy(here):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sentence = rf"nobody answers at http://127.0.0.1:{port} after 0.3 s: start `uv run inference @ ...`"
    with pytest.raises(Refusal, match=sentence):
        probe(probing(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/weight_info", None, "/weight_info with status 404 from BaseHTTP"),
        ("/weight_info", b"<html>Welcome", "/weight_info with status 200 .*beginning '<html>Welcome'"),
        ("/weight_info", b"[" * 5000, "/weight_info with status 200"),
        ("/v1/models", None, "/v1/models with status 404 from BaseHTTP"),
        ("/v1/models", b'{"models": []}', r"""/v1/models with status 200 .*beginning '{"models": \[\]}'"""),
    ],
)
def test_a_healthy_server_of_another_kind_is_refused_with_what_it_answers(here, answers, path, body, said):
    answers[path] = body
    with pytest.raises(Refusal, match=said) as refused:
        probe(probing(answers["url"]))
    assert "orchestrator.client.base_url" in str(refused.value)


def test_a_server_that_knows_no_health_is_named_by_its_answer(here, answers, caplog):
    del answers["/health"]
    with pytest.raises(Refusal, match=r"/health answers with status 404 from BaseHTTP.*no inference server"):
        probe(probing(answers["url"]))
    assert "nobody answers" not in caplog.text
    assert caplog.text.count("/health answers with status 404") == 1


def test_what_answers_in_no_http_at_all_is_named_by_its_first_bytes(here):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet():
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                    connection.recv(4096)

        threading.Thread(target=greet, daemon=True).start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Refusal, match=r"/health answers with no HTTP \('SSH-2\.0-OpenSSH_9\.6"):
            probe(probing(url))


@pytest.mark.parametrize(
    ("sampling", "evaluation", "sentence"),
    [
        (0.0099, 1.0, r"orchestrator\.sampling\.temperature is 0\.0099: .* at least 0\.01\."),
        (float("inf"), 1.0, r"orchestrator\.sampling\.temperature is inf"),
        (
            1.0,
            0.0005,
            r"orchestrator\.eval\.temperature is 0\.0005: .* at least 0\.01, or 0 for the most probable",
        ),
        (0.01, 0.0, None),
        (1.0, 0.01, None),
    ],
)
def test_one_rule_for_temperatures_on_both_sides(here, sampling, evaluation, sentence):
    env = {"id": "reverse_text", "args": {"data": "train.jsonl", "eval_data": "train.jsonl"}}
    sections = {"sampling": {"temperature": sampling}, "eval": {"temperature": evaluation}}
    tried = config(env, orchestrator=sections)
    if sentence is None:
        check(tried, Seen(Inputs()))
        for temperature in (sampling, evaluation):
            assert sampling_params(temperature=temperature).temperature == temperature
        return
    with pytest.raises(Refusal, match=sentence):
        check(tried, Seen(Inputs()))
    with pytest.raises(Refusal, match="temperature must be 0 or at least"):
        sampling_params(temperature=sampling if sampling != 1.0 else evaluation)


def test_another_architecture_is_refused_with_both_values(here, answers):
    facts = {"model_type": "qwen3", "hidden_size": 256, "only_theirs": 1}
    info = {"weight_version": "default", "architecture": "0", "architecture_facts": facts}
    answers["/weight_info"] = json.dumps(info).encode()
    with pytest.raises(Refusal, match=r"another model \(hidden_size 256\) than .* \(hidden_size 128\)"):
        probe(probing(answers["url"]))


@pytest.mark.parametrize(
    "info",
    [
        {"weight_version": "default"},
        {"architecture": "0", "architecture_facts": {"hidden_size": 128, "vocab_size": 64}},
    ],
)
def test_a_server_that_fits_or_says_nothing_about_itself_passes(here, answers, info):
    answers["/weight_info"] = json.dumps(info).encode()
    probe(probing(answers["url"]))


def test_a_model_that_is_no_directory_is_not_compared(here, answers):
    answers["/weight_info"] = json.dumps({"architecture_facts": {"hidden_size": 1}}).encode()
    probe(probing(answers["url"], model={"name": "somebody/some-model"}))


def test_another_tokenizer_is_loaded_from_where_it_is_named(here):
    shutil.copytree(MODEL, here / "tokenizer")
    (here / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(Refusal, match=r"has no tokenizer\.json"):
        check(config(model={"name": str(MODEL), "tokenizer": str(here / "tokenizer")}), Seen(Inputs()))


def test_the_policies_that_are_evaluated():
    every_4 = EvalConfig(interval=4)
    assert [step for step in range(11) if every_4.is_due(step, 10)] == [0, 4, 8, 10]
    not_at_start = EvalConfig(interval=4, at_start=False)
    assert [step for step in range(11) if not_at_start.is_due(step, 10)] == [4, 8, 10]


def test_a_metric_is_averaged_over_the_rollouts_that_have_it():
    assert mean_metrics([{"a": 1.0}, {"a": 0.0, "b": 0.5}, {}]) == {"a": 0.5, "b": 0.5}


def one_sample(rollout, reward, policies, env="e"):
    spans = [VersionSpan(policy, 2 + i, 3 + i) for i, policy in enumerate(policies)]
    count = len(policies)
    return Sample(
        env=env,
        task="t",
        draw=5,
        rollout=rollout,
        token_ids=[9] * (2 + count),
        mask=[False] * 2 + [True] * count,
        logprobs=[0.0] * 2 + [-1.0] * count,
        versions=spans,
        reward=reward,
        advantage=0.0,
        finish_reason="length" if rollout else "stop",
        metrics={"m": reward} if rollout else {},
    )


def test_the_row_of_a_batch_by_hand():
    group = Group(5, [one_sample(0, 1.0, [3, 4]), one_sample(1, 0.5, [4, 4, 4, 4])])
    samples = credited([group], divide_by_std=False)
    assert [sample.advantage for sample in samples] == [0.25, -0.25]
    progress = Progress(step=5, total_samples=20, total_tokens=300, total_problems=10)
    assert exact_row(Batch(4, [group], {"env_error": 2}), samples, progress) == {
        "step": 5,
        "reward/mean": 0.75,
        "reward/std": 0.25,
        "reward/equal_groups": 0.0,
        "reward/e/mean": 0.75,
        "env/e/m": 0.5,
        "completion/mean_length": 3.0,
        "completion/cut": 0.5,
        "policy/off_policy_steps": 0.5,  # batch 4: one sample's oldest token is of policy 3
        "rollouts/trained": 2,
        "rollouts/tokens": 6,
        "rollouts/dropped/env_error": 2,
        "progress/total_samples": 20,
        "progress/total_tokens": 300,
        "progress/total_problems": 10,
    }
