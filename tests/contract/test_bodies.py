"""What a server makes of bodies that nobody should send, and of clients that leave: a sentence, never a traceback."""

import http.client
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import openai
import pytest
from inference_server import LONG, Server, Torch, command, make_model

from ratchet.chat import Chat

ROUTES = ["/v1/chat/completions", "/v1/completions", "/inference/v1/generate"]
LIMIT = (4 << 20) + 64 * LONG
"""Bytes of a body, for this server's `max_model_len`."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bodies") / "model")


@pytest.fixture(scope="module")
def server(model):
    server = Server(command(Torch(), 0, model), model.parent / "server.log")
    yield server
    half = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(half.encode())
        time.sleep(0.2)
        assert server.stop() == 0, server.log.read_text()
        assert connection.recv(12) == b"HTTP/1.1 503"
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server, path, body):
    """The status, and the sentence where there is one. A body in parts is sent without its length."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    return response.status, json.loads(data)["error"]["message"] if response.status >= 400 else data


def chat(content="abc", **more):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2} | more


# -- bodies that cannot be read -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ROUTES, "/update_weights", "/finish_weight_update"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'"text"',
        b"{",
        b'{"messages": \xff\xfe}',
        b'{"prompt": "\xc3("}',
        b'{"prompt": "bad \\ud83d emoji"}',
        b'{"messages": [{"role": "user", "content": "bad \\ude00 emoji"}]}',
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b"\x00" * 64,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_json_object_is_a_400_with_a_sentence(server, path, body):
    status, sentence = post(server, path, body)
    assert status == 400
    assert sentence.endswith(".")


def test_a_body_beyond_the_limit_is_a_413_however_it_is_sent(server):
    text = "x" * (12 << 20)
    body = json.dumps(chat(text)).encode()
    sentence = f"The body has {len(body)} bytes: this server reads {LIMIT} at most."
    assert post(server, "/v1/chat/completions", body) == (413, sentence)
    parts = iter([body[:1000], body[1000:]])
    assert post(server, "/v1/chat/completions", parts) == (413, sentence)
    assert post(server, "/finish_weight_update", body)[0] == 413


def test_a_text_of_the_largest_size_is_tokenised_while_the_server_gives_signs_of_life(server):
    body = json.dumps(chat("abc de " * (LIMIT // 8))).encode()
    assert len(body) < LIMIT
    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(post, server, "/v1/chat/completions", body)
        waited = []
        while not posting.done():
            started = time.monotonic()
            assert server.call("GET", "/health") == (200, None)
            waited.append(time.monotonic() - started)
    status, sentence = posting.result()
    assert status == 400
    assert "exceeds the maximum model length" in sentence
    assert max(waited) < sum(waited) / 2, "one look waited for the whole of it"


def test_a_client_that_leaves_in_mid_body_is_a_line_in_the_log(server):
    for path in ROUTES:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
            connection.sendall(head.encode() + b'{"messages": [')
    deadline = time.monotonic() + 30
    while (log := server.log.read_text()).count("left after") < len(ROUTES):
        assert time.monotonic() < deadline, log
        time.sleep(0.02)
    assert all(f"a client of {path} left after 14 bytes of its request" in log for path in ROUTES)
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b"\x16\x03\x01 hello\r\n\r\n", b"GET\r\n\r\n"]
)
def test_a_head_that_is_no_request_ends_that_connection_alone(server, head):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(12) in (b"HTTP/1.1 404", b"HTTP/1.1 400")
    assert server.call("GET", "/health") == (200, None)


# -- fields of the wrong kind, from a generator -------------------------------------------------------------

ODD = [
    None, True, False, 0, 1, -1, 2.5, 10**30, -(10**30), 1e300, 5e-324, "", "x", "\u0000", "😀" * 3, [], [[]], [None],
    [[5], "a"], {}, {"type": "text"}, {"a": {"b": [1]}}, [{"role": "user"}], [{"content": "x"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": 3, "content": "x"}], [{"role": "user", "content": 7}], [{"role": "user", "content": ["x"]}], [63, 64],
]  # fmt: skip
NAMES = [
    "messages", "prompt", "token_ids", "model", "n", "temperature", "seed", "max_tokens", "max_completion_tokens",
    "stop",
    "stop_token_ids", "logprobs", "ignore_eos", "return_token_ids", "stream", "stream_options", "sampling_params",
    "top_p", "top_k", "logit_bias", "tools", "response_format", "user", "beam", "echo",
]  # fmt: skip
SOUND = {
    "/v1/chat/completions": chat(),
    "/v1/completions": {"prompt": "abc", "max_tokens": 2},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 2}},
}


def malformed(seed):
    """A path, and a sound body of it with one to three fields replaced; some end too early, some have a bad byte."""
    chance = random.Random(seed)
    path = chance.choice(ROUTES)
    body = dict(SOUND[path])
    for name in chance.sample(NAMES, chance.choice([1, 1, 1, 2])):
        inside = (
            path == "/inference/v1/generate" and name not in ("token_ids", "model") and chance.random() < 0.5
        )
        if inside and isinstance(body["sampling_params"], dict):
            body["sampling_params"] = {**body["sampling_params"], name: chance.choice(ODD)}
        else:
            body[name] = chance.choice(ODD)
    data = bytearray(json.dumps(body).encode())
    if chance.random() < 0.1:
        del data[chance.randrange(len(data)) :]
    elif chance.random() < 0.1:
        data[chance.randrange(len(data))] = chance.randrange(256)
    return path, bytes(data)


def test_whatever_is_sent_is_answered_or_refused_with_a_sentence(server):
    found = []
    for seed in range(300):
        path, body = malformed(seed)
        status, answer = post(server, path, body)
        assert status in (200, 400, 404), (seed, path, body, answer)
        assert status == 200 or (answer.endswith(".") and len(answer) <= 1003), (seed, answer)
        found.append(status)
    assert 20 < found.count(200) < 150, "some are sound all the same, and most are not"
    assert "Traceback" not in server.log.read_text()


# -- what openai clients send -------------------------------------------------------------------------------


def test_a_model_is_retrieved_by_its_name_and_another_is_not_there(client, model):
    assert client.models.retrieve(str(model)).id == str(model)
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")


def test_a_chat_is_streamed_as_whole_choices(client, model):
    given = {"model": str(model), "messages": chat()["messages"], "seed": 3, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**given, logprobs=True)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**given, logprobs=True, stream=True, stream_options=options))
    assert [chunk.object for chunk in chunks] == ["chat.completion.chunk"] * 3
    for choice, chunk in zip(whole.choices, chunks[:2], strict=True):
        (streamed,) = chunk.choices
        assert (streamed.index, streamed.finish_reason) == (choice.index, choice.finish_reason)
        assert (streamed.delta.role, streamed.delta.content) == ("assistant", choice.message.content)
        assert streamed.logprobs.model_dump() == {"refusal": None, **choice.logprobs.model_dump()}
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert [chunk.usage for chunk in chunks[:2]] == [None, None]


def test_a_completion_is_streamed_as_whole_choices(client, model):
    given = {"model": str(model), "prompt": ["abc", "de"], "seed": 3, "max_tokens": 12}
    whole = client.completions.create(**given)
    chunks = list(client.completions.create(**given, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == [choice.text for choice in whole.choices]
    assert [chunk.choices[0].index for chunk in chunks] == [0, 1]


def test_a_refusal_of_a_stream_is_an_ordinary_error(client, model):
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model=str(model), messages=chat()["messages"], stream=True, top_p=0.5)


HARMLESS = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "n": 1, "frequency_penalty": 0, "presence_penalty": 0,
    "logit_bias": {}, "top_p": 1, "stream_options": {"include_usage": True}, "stream": False, "tools": [],
    "tool_choice": "auto", "response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto",
    "stop": None, "temperature": None, "suffix": None, "reasoning_effort": None, "some_day": None,
}  # fmt: skip


@pytest.mark.parametrize("path", ROUTES[:2])
def test_fields_that_change_nothing_change_nothing(server, path):
    body = {**SOUND[path], "seed": 5, "max_tokens": 12}
    plain, harmless = (server.post(path, given)["choices"] for given in (body, body | HARMLESS))
    assert plain == harmless


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user", "content": None}, r"messages\[1\] has no content: each message needs a text"),
        ({"role": "user"}, r"messages\[1\] has no content"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            r"messages\[1\] has no content, and tool calls are not read",
        ),
        ({"content": "x"}, r"messages\[1\] has no role"),
        ({"role": "user", "content": 7}, r"messages\[1\] has a content that is no text"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"messages\[1\] has a part of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\] has a content that is no text"),
    ],
)
def test_a_message_that_is_no_text_is_named_by_its_place(client, model, message, sentence):
    messages = [{"role": "user", "content": "a"}, message]
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.chat.completions.create(model=str(model), messages=messages)


def test_a_text_in_parts_is_the_text(server, model):
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    whole, in_parts = (server.post(ROUTES[0], chat(text, return_token_ids=True)) for text in ("abc", parts))
    expected = Chat.load(str(model)).render([{"role": "user", "content": "abc"}])
    assert whole["prompt_token_ids"] == in_parts["prompt_token_ids"] == expected


def test_more_choices_than_one_request_may_have_are_refused(server):
    body = {"prompt": [[5]] * 3, "max_tokens": 1, "n": 1366}
    assert server.refused(400, ROUTES[1], body) == "3 prompts, n = 1366: 4096 choices are the most."
