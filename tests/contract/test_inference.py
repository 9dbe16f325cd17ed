"""The wire protocol of the inference server, over real HTTP against a real process, for every engine.

vLLM takes part where its environment is named: `pytest tests/contract/test_inference.py -n 0 --vllm-python PYTHON`.
"""

import json
import math
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from inference_server import (
    LONG,
    ROOT,
    SLOTS,
    TOLERANCE,
    Background,
    Server,
    Torch,
    Vllm,
    command,
    distributions_of,
    logprobs_of,
    make_model,
    publish,
    values,
)

from ratchet import attempts, config_io, durable, weights
from ratchet.attempts import Plan, Record
from ratchet.config import RLConfig
from ratchet.launch.early import child_environment
from ratchet.launch.run import listen
from ratchet.paths import RunPaths
from ratchet.stage import Stage

ENDLESS = LONG - 3
"""Tokens that keep a slot busy for seconds."""


def pytest_generate_tests(metafunc):
    if "engine" in metafunc.fixturenames:
        is_named = metafunc.config.getoption("vllm_python") is not None
        engines = ["torch", "vllm"] if is_named else ["torch"]
        metafunc.parametrize("engine", engines, indirect=True, scope="module")


@pytest.fixture(scope="module")
def engine(request):
    return Torch() if request.param == "torch" else Vllm(request.config.getoption("vllm_python"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, engine):
    return tmp_path_factory.mktemp(engine.name)


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "model")


@pytest.fixture(scope="module")
def policies(folder, model):
    """Published weights: two policies of the served model."""
    return {name: publish(folder / "run", step, model, seed=step) for step, name in enumerate("ab")}


@pytest.fixture(scope="module")
def running(folder, model, engine):
    server = Server(command(engine, 0, model), folder / "server.log")
    yield server
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture
def server(running, policies):
    """The server with policy a, idle; whatever a test does, it must leave it serving."""
    running.adopt(policies["a"], "a")
    yield running
    running.post("/resume")
    running.wait_until(lambda info: info["active"] == info["waiting"] == 0 and not info["paused"])


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def background(server):
    work = Background(server)
    yield work
    work.pool.shutdown()


# -- tokens in, tokens out ----------------------------------------------------------------------------------


def test_generate_answers_in_vllms_shape(server):
    choice = server.generate([5, 6, 7], max_tokens=4, seed=1)
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 4
    assert choice["weight_versions"] == [{"version": "a", "start": 0, "end": 4}]


def test_an_answer_is_that_of_the_policy(server, engine, policies):
    choice = server.generate([5, 6, 7], seed=3)
    engine.assert_sampled_from(policies["a"], choice, [5, 6, 7], 3)
    assert values(server.generate([5, 6, 7], seed=3)) == values(choice)


def test_logprobs_are_those_of_the_distribution_that_was_sampled(server, policies):
    choice = server.generate([5, 6, 7], seed=3, temperature=0.5, max_tokens=60)
    tokens, logprobs = values(choice)
    plain = logprobs_of(policies["a"], [5, 6, 7], tokens)
    assert max(abs(a - b) for a, b in zip(logprobs, plain, strict=True)) > 0.1
    assert sum(logprobs) > sum(plain)


def test_temperature_0_takes_the_most_probable_token(server, policies):
    tokens, logprobs = values(server.generate([5, 6, 7], temperature=0, max_tokens=60))
    distributions = distributions_of(policies["a"], [5, 6, 7], tokens)[:-1]
    assert tokens == distributions.argmax(-1).tolist()
    assert logprobs == pytest.approx(distributions.max(-1).values.tolist(), abs=TOLERANCE)


def test_tokens_come_as_often_as_the_policy_says(server, policies):
    """Chi-squared over the first tokens of 600 seeds; those that are expected less than 5 times count as one."""
    with ThreadPoolExecutor(8) as pool:
        choices = pool.map(lambda seed: server.generate([5, 6, 7], seed=seed, max_tokens=1), range(600))
    counts = Counter(choice["token_ids"][0] for choice in choices)
    expected = {i: 600 * math.exp(p) for i, p in enumerate(distributions_of(policies["a"], [5, 6, 7], [])[0])}
    often = [i for i in expected if expected[i] >= 5]
    rest = 600 - sum(expected[i] for i in often)
    chi2 = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in often)
    chi2 += (600 - sum(counts[i] for i in often) - rest) ** 2 / rest
    assert len(often) > 10
    assert chi2 < len(often) + 4 * math.sqrt(2 * len(often))


def test_answers_do_not_depend_on_concurrent_requests(server, engine):
    def one(i):
        return values(server.generate([3 + i % 5, 9, 9], max_tokens=8 + i % 7, seed=i))

    expected = [one(i) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        forward, backward = list(pool.map(one, range(24))), list(pool.map(one, reversed(range(24))))
    assert all(map(engine.are_equal, forward, expected))
    assert all(map(engine.are_equal, backward, expected[::-1]))


def test_n_choices_have_derived_seeds(server, engine):
    params = {"n": 3, "seed": 5, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
    answer = server.post("/inference/v1/generate", {"token_ids": [5], "sampling_params": params})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for i, choice in enumerate(answer["choices"]):
        alone = server.generate([5], max_tokens=8, seed=engine.seed_of_choice(5, i))
        assert engine.are_equal(values(choice), values(alone))


def test_without_a_seed_answers_differ(server):
    assert server.generate([5])["token_ids"] != server.generate([5])["token_ids"]


def test_stop_tokens_and_eos(server):
    free = server.generate([5, 6], seed=2, max_tokens=60)
    end = free["token_ids"][5]
    stopped = server.generate([5, 6], seed=2, max_tokens=60, stop_token_ids=[end])
    first = free["token_ids"].index(end)
    assert stopped["token_ids"] == free["token_ids"][: first + 1]
    assert stopped["finish_reason"] == "stop"
    seed = next(s for s in range(200) if 1 in server.generate([5, 6], seed=s)["token_ids"])
    eos = server.generate([5, 6], seed=seed, ignore_eos=False)
    assert (eos["token_ids"][-1], eos["finish_reason"]) == (1, "stop")


def test_a_completion_ends_where_the_model_length_does(server):
    choice = server.generate([5] * (LONG - 3), max_tokens=50)
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (3, "length")


@pytest.mark.parametrize(
    ("changes", "sampling", "names"),
    [
        ({"token_ids": [5] * LONG}, {}, f"{LONG} tokens"),
        ({"token_ids": []}, {}, "no tokens"),
        ({"token_ids": [5, 64]}, {}, "vocabulary of 64"),
        ({"token_ids": [-1]}, {}, "token_ids"),
        ({"token_ids": "abc"}, {}, "token_ids"),
        ({}, {"top_p": 0.9}, "top_p = 0.9 .* falsify"),
        ({}, {"top_k": 20}, "top_k = 20 .* falsify"),
        ({}, {"temperature": -1}, "temperature"),
        ({}, {"temperature": 1e-9}, "temperature must be 0 or at least"),
        ({}, {"max_tokens": 0}, "max_tokens"),
        ({}, {"logprobs": 5}, "logprobs = 5 .* 0 gives"),
        ({}, {"presence_penalty": 1.0}, "presence_penalty"),
        ({}, {"beam": 3}, "beam"),
        ({"stream": True}, {}, "stream = True"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(server, engine, changes, sampling, names):
    body = {"token_ids": [5], "sampling_params": {"max_tokens": 2} | sampling} | changes
    if engine.does & {*changes, *sampling, *sampling.items()}:
        assert server.call("POST", "/inference/v1/generate", body)[0] == 200
    else:
        sentence = server.refused(400, "/inference/v1/generate", body)
        assert re.search(names, sentence) or engine.does, sentence


def test_another_models_name_is_not_served(server, model):
    body = {"token_ids": [5], "sampling_params": {"max_tokens": 2}}
    assert "nope" in server.refused(404, "/inference/v1/generate", {**body, "model": "nope"})
    assert server.post("/inference/v1/generate", {**body, "model": str(model)})


def test_bad_bodies_and_unknown_paths_are_json_errors(server):
    assert "token_ids" in server.refused(400, "/inference/v1/generate", {})
    server.refused(400, "/inference/v1/generate", [1])
    status, answer = server.call("POST", "/nothing", {})
    assert (status, type(answer)) == (404, dict)
    assert server.call("GET", "/health") == (200, None)


def send(server, n):
    """A connection on which a request was sent, and nobody reads the answer."""
    sampling = {"max_tokens": ENDLESS, "n": n, "ignore_eos": True}
    data = json.dumps({"token_ids": [5], "sampling_params": sampling}).encode()
    head = "POST /inference/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + data)
    return connection


def test_a_client_that_goes_away_frees_its_slots(server):
    with send(server, SLOTS), send(server, 2):
        server.wait_until(lambda info: info["active"] == SLOTS and info["waiting"] == 2)
    server.wait_until(lambda info: info["active"] == info["waiting"] == 0)


# -- the openai client --------------------------------------------------------------------------------------


def test_the_openai_client_lists_the_model(client, model):
    (card,) = client.models.list().data
    assert card.id == str(model)
    assert card.model_dump()["max_model_len"] == LONG


def test_the_openai_client_chats(client, model):
    answer = client.chat.completions.create(
        model=str(model),
        messages=[{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
        n=2,
        seed=1,
        max_completion_tokens=6,
        temperature=0.8,
        logprobs=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert answer.usage.prompt_tokens == len(answer.model_dump()["prompt_token_ids"])
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        tokens = choice.model_dump()["token_ids"]
        assert len(choice.logprobs.content) == len(tokens) == 6
        assert choice.finish_reason == "length"
        assert choice.message.role == "assistant"


def test_the_openai_client_completes(client, model, server, engine):
    answer = client.completions.create(
        model=str(model),
        prompt=["abc", "de"],
        seed=1,
        max_tokens=5,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    first, second = answer.choices
    assert first.model_dump()["prompt_token_ids"] != second.model_dump()["prompt_token_ids"]
    alone = server.generate(first.model_dump()["prompt_token_ids"], max_tokens=5, seed=1)
    assert engine.are_equal(values(alone), (first.model_dump()["token_ids"], first.logprobs.token_logprobs))


def test_a_stop_string_is_left_out_of_the_text(client, model):
    def complete(**more):
        extra = {"ignore_eos": True, "return_token_ids": True}
        return client.completions.create(
            model=str(model), prompt="abc", seed=4, max_tokens=40, extra_body=extra, **more
        ).choices[0]

    text = complete().text
    stop = text[10:12]
    stopped = complete(stop=[stop])
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_refusals_reach_the_openai_client_as_its_own_errors(client, model, engine):
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.chat.completions.create(model="gpt", messages=messages)
    if "no content" not in engine.does:
        with pytest.raises(openai.BadRequestError, match=r"role|content"):
            client.chat.completions.create(model=str(model), messages=[{"role": "user"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=str(model), messages=messages, temperature=-1)


# -- live weights -------------------------------------------------------------------------------------------


def test_weights_there_and_back_are_those_of_a_fresh_model(server, engine, policies):
    found = []
    for name in "aba":
        server.adopt(policies[name], f"run/0/{name}")
        choice = server.generate([5, 6, 7], seed=9)
        found.append(values(choice))
        engine.assert_sampled_from(policies[name], choice, [5, 6, 7], 9)
        assert choice["weight_versions"] == [{"version": f"run/0/{name}", "start": 0, "end": 16}]
        assert server.info()["weight_version"] == f"run/0/{name}"
    assert engine.are_equal(found[0], found[2])
    assert found[0] != found[1]


def test_keep_continues_in_flight_on_the_new_weights_with_exact_labels(server, policies, background):
    requests = background.generate(SLOTS, max_tokens=ENDLESS)
    server.wait_until(lambda info: info["active"] == SLOTS)
    server.post("/pause?mode=keep")
    frozen = server.info()
    assert (frozen["active"], frozen["paused"]) == (SLOTS, True)
    server.load(policies["b"])
    server.post("/finish_weight_update", {"weight_version": "b"})
    server.post("/resume")
    choices = [request.result() for request in requests]
    for choice in choices:
        before, after = choice["weight_versions"]
        assert (before["version"], before["start"]) == ("a", 0)
        assert (after["version"], after["start"], after["end"]) == ("b", before["end"], ENDLESS)
    # Up to the label every token is policy a's, and from the very next one on it no longer is.
    end = choices[0]["weight_versions"][0]["end"]
    tokens, logprobs = values(choices[0])
    expected = logprobs_of(policies["a"], [5, 6, 7], tokens[: end + 1])
    assert logprobs[:end] == pytest.approx(expected[:end], abs=TOLERANCE)
    assert abs(logprobs[end] - expected[end]) > TOLERANCE


def test_wait_drains_first_and_holds_back_what_comes_later(server, engine, policies, background):
    early = background.generate(SLOTS + 2, max_tokens=300)
    server.wait_until(lambda info: info["active"] == SLOTS and info["waiting"] == 2)
    pausing = background.pool.submit(server.post, "/pause?mode=wait")
    server.wait_until(lambda info: info["draining"])
    late = background.generate(1, max_tokens=20)
    pausing.result()
    held_back = 0 if engine.drains_queue else 2
    assert (server.info()["active"], server.info()["waiting"]) == (0, 1 + held_back)
    server.load(policies["b"])
    server.post("/finish_weight_update", {"weight_version": "b"})
    server.post("/resume")
    served = [request.result()["weight_versions"] for request in early]
    assert served.count([{"version": "a", "start": 0, "end": 300}]) == SLOTS + 2 - held_back
    assert served.count([{"version": "b", "start": 0, "end": 300}]) == held_back
    assert late[0].result()["weight_versions"] == [{"version": "b", "start": 0, "end": 20}]


def test_abort_returns_partial_completions(server, background):
    requests = background.generate(SLOTS + 1, max_tokens=ENDLESS)
    server.wait_until(lambda info: info["active"] == SLOTS and info["waiting"] == 1)
    server.post("/pause?mode=abort")
    found = sorted((r.result() for r in requests), key=lambda choice: len(choice["token_ids"]))
    assert [choice["finish_reason"] for choice in found] == ["abort"] * (SLOTS + 1)
    assert found[0]["token_ids"] == []
    assert 0 < len(found[1]["token_ids"]) < ENDLESS


def test_a_resume_answers_a_pause_that_still_drains(server, background):
    background.generate(1, max_tokens=ENDLESS)
    server.wait_until(lambda info: info["active"] == 1)
    pausing = background.pool.submit(server.refused, 409, "/pause?mode=wait")
    server.wait_until(lambda info: info["draining"])
    late = background.generate(1, max_tokens=2)
    server.wait_until(lambda info: info["waiting"] == 1)
    server.post("/resume")
    assert "resumed" in pausing.result()
    assert len(late[0].result()["token_ids"]) == 2
    server.post("/pause?mode=abort")


def test_calls_out_of_sequence_are_refused(server, policies):
    update = {"update_info": {"path": str(policies["b"])}}
    assert "/pause first" in server.refused(409, "/start_weight_update")
    assert "/start_weight_update first" in server.refused(409, "/update_weights", update)
    assert "/update_weights first" in server.refused(409, "/finish_weight_update", {"weight_version": "b"})
    assert "mode must be one of" in server.refused(400, "/pause?mode=now")
    server.post("/pause?mode=keep")
    assert "/start_weight_update first" in server.refused(409, "/update_weights", update)
    server.post("/start_weight_update")
    assert "weight_version" in server.refused(400, "/finish_weight_update", {})
    assert "update_info" in server.refused(400, "/update_weights", {})
    server.post("/update_weights", update)
    assert "no version yet" in server.refused(409, "/resume")
    assert server.info()["weight_version"] == "unlabelled"
    server.post("/finish_weight_update", {"weight_version": "b"})


@pytest.mark.parametrize("died_after", ["/pause", "/start_weight_update", "/update_weights"])
@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_client_that_died_inside_an_update_leaves_a_server_that_the_next_one_can_use(
    server, engine, policies, background, died_after, mode
):
    requests = background.generate(2, max_tokens=500)
    server.wait_until(lambda info: info["active"] == 2)
    server.post("/pause?mode=keep")
    if died_after != "/pause":
        server.post("/start_weight_update")
    if died_after == "/update_weights":
        server.post("/update_weights", {"update_info": {"path": str(policies["b"])}})
    server.adopt(policies["b"], "b", mode)
    engine.assert_sampled_from(policies["b"], server.generate([5], seed=1), [5], 1)
    spans = [span for request in requests for span in request.result()["weight_versions"]]
    assert {span["version"] for span in spans} <= {"a", "b"}


def test_an_update_takes_the_first_directory_that_is_there(server, folder, policies, engine):
    """The best way first: memory of the trainer's machine, which a server elsewhere does not see."""
    paths = [str(folder / "nowhere" / "step_1"), str(policies["b"]), str(policies["a"])]
    digest = weights.digest(durable.read_manifest(policies["b"]))
    server.post("/pause?mode=keep")
    server.post("/start_weight_update")
    info = {"path": str(policies["a"]), "paths": paths, "digest": digest}
    server.post("/update_weights", {"update_info": info})
    server.post("/finish_weight_update", {"weight_version": "b"})
    server.post("/resume")
    engine.assert_sampled_from(policies["b"], server.generate([5], seed=1), [5], 1)


def test_directories_that_are_not_seen_and_other_policies_are_refused(server, folder, policies):
    """Of which digest a policy is says the client; where one was put in place of another it is asked again."""
    nowhere, digest = (
        [str(folder / "nowhere" / "step_1")],
        weights.digest(durable.read_manifest(policies["b"])),
    )
    server.post("/pause?mode=keep")
    server.post("/start_weight_update")
    unseen = {"path": nowhere[0], "paths": nowhere, "digest": digest}
    assert "set weights.publish_interval = 1" in server.refused(
        410, "/update_weights", {"update_info": unseen}
    )
    other = {"path": str(policies["a"]), "paths": [str(policies["a"])], "digest": digest}
    assert "holds another policy" in server.refused(400, "/update_weights", {"update_info": other})
    server.post("/resume")
    assert server.info()["weight_version"] == "a"


def test_other_weights_are_refused_and_the_old_ones_served(server, folder):
    expected = values(server.generate([5, 6], seed=1))
    other = publish(folder / "other", 0, make_model(folder / "other-model", intermediate_size=128), seed=0)
    server.post("/pause?mode=keep")
    server.post("/start_weight_update")
    sentence = server.refused(409, "/update_weights", {"update_info": {"path": str(other)}})
    assert str(other) in sentence
    assert "another network" in sentence
    server.post("/resume")
    assert server.info()["weight_version"] == "a"
    assert values(server.generate([5, 6], seed=1)) == expected


def flip_a_byte(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def remove_the_manifest(directory):
    (directory / "MANIFEST.json").unlink()


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_tensor(name, like):
    return lambda tensors: tensors | {name: tensors[like] + 1}


def transposed(name):
    return lambda tensors: tensors | {name: tensors[name].T}


@pytest.mark.parametrize(
    ("step", "change", "damage", "names"),
    [
        (10, None, flip_a_byte, "model.safetensors is damaged: expected xxh3"),
        (11, None, remove_the_manifest, "never committed"),
        (
            12,
            without("model.layers.1.mlp.up_proj.weight"),
            None,
            "lacks the tensor model.layers.1.mlp.up_proj",
        ),
        (13, with_tensor("extra", "model.norm.weight"), None, "does not know: extra"),
        (14, transposed("model.layers.0.mlp.up_proj.weight"), None, "has shape"),
        (15, with_tensor("lm_head.weight", "model.embed_tokens.weight"), None, "one tensor in the model"),
    ],
)
def test_weights_that_are_not_whole_are_refused_before_the_model_is_touched(
    server, folder, model, step, change, damage, names
):
    expected = values(server.generate([5, 6], seed=1))
    directory = publish(folder / "run", step, model, seed=step, change=change)
    if damage is not None:
        damage(directory)
    server.post("/pause?mode=keep")
    server.post("/start_weight_update")
    assert names in server.refused(400, "/update_weights", {"update_info": {"path": str(directory)}})
    server.post("/resume")
    assert values(server.generate([5, 6], seed=1)) == expected
    assert server.info()["weight_version"] == "a"


def test_the_prefix_cache_is_reset_with_and_without_running_requests(server, background):
    (request,) = background.generate(1, max_tokens=500)
    server.wait_until(lambda info: info["active"] == 1)
    server.post("/reset_prefix_cache?reset_running_requests=true")
    server.post("/reset_prefix_cache")
    server.post("/init_weight_transfer_engine", {"init_info": {}})
    assert len(request.result()["token_ids"]) == 500


def test_weight_info_says_what_the_server_is(server, engine, policies):
    info = server.info()
    expected = {"slots": SLOTS, "max_model_len": LONG, "dtype": "float32", "device": "cpu", **engine.facts}
    assert {key: info[key] for key in expected} == expected
    assert len(info["architecture"]) == 32
    assert info["architecture_facts"] == weights.read_facts(policies["a"])


# -- processes and signals ----------------------------------------------------------------------------------


def open_attempt(root, model, engine):
    """An attempt as the launcher leaves it for its programs."""
    paths = RunPaths(root)
    paths.staging.mkdir(parents=True)
    paths.attempt(1).mkdir(parents=True)
    settings = {"slots": SLOTS, "max_model_len": 64} | engine.settings
    rl = RLConfig.model_validate(
        {
            "model": {"name": str(model), "random_init": True},
            "max_steps": 1,
            "output_dir": root,
            "inference": settings,
        }
    )
    resolved = config_io.to_toml(rl)
    (paths.attempt(1) / "run.toml").write_bytes(resolved)
    stage = Stage.open(paths, "001.launcher.0")
    record = Record(
        attempt=1,
        kind="rl",
        run_id="r",
        lineage=0,
        argv=[],
        resume_step=None,
        plan=Plan(),
        config_xxh3=durable.hash_bytes(resolved),
    )
    attempts.write(stage, record)
    Stage.open(paths, attempts.token(1, "inference", 1))


@pytest.mark.slow
def test_a_runs_own_server_is_killed_and_a_standing_one_takes_its_port(folder, model, policies, engine):
    root = folder / "own"
    open_attempt(root, model, engine)
    with listen("127.0.0.1", 0) as listener:
        fd = listener.fileno()
        arguments = [sys.executable, "-m", "ratchet.inference", root, 1, 1, "--fd", fd]
        own = Server(arguments, folder / "own.log", pass_fds=(fd,), env=child_environment(1))
    assert own.url == f"http://127.0.0.1:{own.port}"
    assert own.info()["weight_version"] == "default"
    own.adopt(policies["a"], "a")
    expected = values(own.generate([5, 6], seed=1))
    own.kill()

    standing = Server(
        command(engine, own.port, model, "--inference.max-model-len", 64), folder / "standing.log"
    )
    try:
        assert standing.port == own.port
        assert standing.info()["weight_version"] == "default"
        assert values(standing.generate([5, 6], seed=1)) != expected
        standing.adopt(policies["a"], "a")
        assert values(standing.generate([5, 6], seed=1)) == expected

        refused = subprocess.run(
            [*map(str, command(engine, own.port, model))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 2
        assert f"127.0.0.1:{own.port} cannot be served on" in refused.stderr
        assert "--inference.port" in refused.stderr

        standing.post("/pause?mode=keep")
        held = Background(standing)
        (request,) = held.generate(1, max_tokens=10)
        standing.wait_until(lambda info: info["waiting"] == 1)
        assert standing.stop(signal.SIGINT) == 0, standing.log.read_text()
        assert engine.stopping in str(request.exception())
        held.pool.shutdown()
    finally:
        standing.kill()
