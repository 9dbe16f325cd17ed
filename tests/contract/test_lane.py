"""The lane of the embedded engine: over a real connection, against a real process."""

import asyncio
import json
import signal
import time
from contextlib import contextmanager

import msgspec
import pytest
from inference_server import LONG, SLOTS, Server, Torch, command, make_model, publish, values
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ratchet import lane
from ratchet.lane import Answer, Ask, Drop, Failure
from ratchet.orchestrator.calls import Request, Torn
from ratchet.orchestrator.client import Client

ENDLESS = LONG - 3
"""Tokens that keep a slot busy for seconds."""
WHILE = 500
"""Tokens that keep it busy for long enough to do something meanwhile."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lane")


@pytest.fixture(scope="module")
def model(folder):
    """One without a stop token, so that an answer is as long as was asked for."""
    directory = make_model(folder / "model")
    (directory / "generation_config.json").unlink()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    return directory


@pytest.fixture(scope="module")
def policies(folder, model):
    return {name: publish(folder / "run", step, model, seed=step) for step, name in enumerate("ab")}


@pytest.fixture(scope="module")
def running(folder, model):
    server = Server(command(Torch(), 0, model), folder / "server.log")
    yield server
    server.kill()


@pytest.fixture
def server(running, policies):
    running.adopt(policies["a"], "a")
    yield running
    running.post("/resume")
    running.wait_until(is_idle)


def is_idle(info):
    return info["active"] == info["waiting"] == 0 and not info["paused"]


class Connection:
    """A lane as bytes on a connection: every frame by itself."""

    def __init__(self, socket):
        self.socket = socket

    def say(self, *messages):
        self.socket.send(lane.encode(list(messages)))

    def hear(self):
        return lane.decode_answered(self.socket.recv(timeout=120))

    def answers(self, count):
        """So many answers, by id, and how many came in each frame."""
        found, sizes = {}, []
        while len(found) < count:
            frame = self.hear()
            sizes.append(len(frame))
            found |= {message.id: message for message in frame}
        return found, sizes


@contextmanager
def connected(server):
    with connect(server.url.replace("http", "ws") + lane.PATH, max_size=None) as socket:
        yield Connection(socket)


def ask(id, prompt=(5, 6, 7), *, seed=0, max_tokens=16, temperature=1.0, stop=()):
    return Ask(id, list(prompt), seed, max_tokens, temperature, list(stop))


def test_it_is_advertised(server):
    assert server.info()["lane"] == lane.VERSION


def test_answers_are_bit_for_bit_those_of_generate_whatever_the_order(server):
    asked = [([5, 6, 7 + i % 3], i) for i in range(9)]
    expected = [server.generate(prompt, seed=seed, ignore_eos=True) for prompt, seed in asked]
    for order in (range(9), reversed(range(9))):
        with connected(server) as connection:
            connection.say(*(ask(i, asked[i][0], seed=asked[i][1]) for i in order))
            found, _ = connection.answers(9)
        for i, choice in enumerate(expected):
            answer = found[i]
            assert (answer.token_ids, answer.logprobs) == values(choice)
            assert answer.versions == [("a", 0, len(answer.token_ids))]
            assert answer.finish_reason == choice["finish_reason"]


def test_a_stop_token_ends_an_answer(server):
    with connected(server) as connection:
        connection.say(ask(0, max_tokens=60))
        (free,) = connection.hear()
        end = free.token_ids[5]
        connection.say(ask(1, max_tokens=60, stop=[end]))
        (stopped,) = connection.hear()
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_nobody_waits_for_the_longest_and_one_step_is_one_frame(server):
    # Four slots: those of three tokens are finished by one and the same step.
    with connected(server) as connection:
        connection.say(*(ask(i, seed=900 + i, max_tokens=3) for i in range(3)), ask(3, max_tokens=ENDLESS))
        first = connection.hear()
        assert sorted(message.id for message in first) == [0, 1, 2]
        assert server.info()["active"] == 1


def test_the_error_of_one_is_that_ones_alone(server):
    with connected(server) as connection:
        connection.say(
            ask(0, [5, 64]),
            ask(1),
            ask(2, [5] * LONG),
            ask(3, temperature=1e-9),
            ask(4, max_tokens=0),
            ask(5, []),
            ask(6),
        )
        found, _ = connection.answers(7)
    refused = {id: message.sentence for id, message in found.items() if isinstance(message, Failure)}
    assert sorted(refused) == [0, 2, 3, 4, 5]
    assert {found[id].status for id in refused} == {400}
    assert "vocabulary of 64" in refused[0]
    assert f"{LONG} tokens" in refused[2]
    assert "temperature must be 0 or at least" in refused[3]
    assert "max_tokens" in refused[4]
    assert "no tokens" in refused[5]
    assert found[1].token_ids == found[6].token_ids


def test_what_is_dropped_leaves_its_slot_and_the_others_are_answered(server):
    with connected(server) as connection:
        connection.say(*(ask(i, max_tokens=ENDLESS) for i in range(SLOTS + 1)))
        server.wait_until(lambda info: info["active"] == SLOTS and info["waiting"] == 1)
        connection.say(*(Drop(i) for i in range(SLOTS + 1)), Drop(77), ask(99, max_tokens=2))
        assert [message.id for message in connection.hear()] == [99]
        server.wait_until(is_idle)


def test_a_connection_that_ends_frees_its_slots_and_no_others(server):
    with connected(server) as one, connected(server) as other:
        one.say(*(ask(i, max_tokens=ENDLESS) for i in range(SLOTS - 1)))
        other.say(ask(0, max_tokens=200, seed=3))
        server.wait_until(lambda info: info["active"] == SLOTS)
        one.socket.socket.close()
        server.wait_until(lambda info: info["active"] <= 1)
        (answer,) = other.hear()
        assert len(answer.token_ids) == 200


@pytest.mark.parametrize("frame", [b"\xc1", msgspec.msgpack.encode([["ask", 1]]), "text"])
def test_what_is_no_frame_ends_the_connection_with_a_reason(server, frame):
    with connected(server) as connection:
        connection.socket.send(frame)
        with pytest.raises(ConnectionClosed, match="not a frame of a lane"):
            connection.socket.recv(timeout=60)


def test_weights_change_under_what_is_in_flight(server, policies):
    with connected(server) as connection:
        connection.say(ask(0, max_tokens=WHILE))
        server.wait_until(lambda info: info["active"] == 1)
        server.adopt(policies["b"], "b")
        (answer,) = connection.hear()
    (before, start, middle), (after, from_, end) = answer.versions
    assert (before, start, after, from_, end) == ("a", 0, "b", middle, WHILE)


def test_a_pause_holds_back_what_is_asked_and_abort_answers_with_what_there_is(server):
    with connected(server) as connection:
        server.post("/pause?mode=keep")
        connection.say(ask(0, max_tokens=2))
        server.wait_until(lambda info: info["waiting"] == 1)
        server.post("/resume")
        assert len(connection.hear()[0].token_ids) == 2
        connection.say(ask(1, max_tokens=ENDLESS))
        server.wait_until(lambda info: info["active"] == 1)
        server.post("/pause?mode=abort")
        (answer,) = connection.hear()
        assert isinstance(answer, Answer)
        assert answer.finish_reason == "abort"
        assert 0 < len(answer.token_ids) < ENDLESS


def request(seed, max_tokens):
    return Request(token_ids=[5, 6, 7], seed=seed, max_tokens=max_tokens, temperature=1.0, stop_token_ids=[])


async def test_a_frozen_server_is_cut_and_has_free_slots_when_it_goes_on(server):
    async with Client(server.url, timeout_s=100, concurrency=8) as client:
        await client.connect()
        await client.weight_info()
        whole = await client.generate(request(1, 4))
        asked = [asyncio.create_task(client.generate(request(i, ENDLESS))) for i in range(SLOTS)]
        await asyncio.to_thread(server.wait_until, lambda info: info["active"] == SLOTS)
        server.process.send_signal(signal.SIGSTOP)
        try:
            client.cut()
            torn = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
            assert [error.cause for error in torn if isinstance(error, Torn)] == ["silent"] * SLOTS
            await asyncio.sleep(1)  # the connection is closed, whatever the server does
        finally:
            server.process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(server.wait_until, is_idle)
        assert await client.generate(request(1, 4)) == whole


async def test_a_cancelled_rollout_frees_its_slot(server):
    async with Client(server.url, timeout_s=100, concurrency=8) as client:
        await client.connect()
        await client.weight_info()
        one, other = (
            asyncio.create_task(client.generate(request(i, n))) for i, n in enumerate((ENDLESS, WHILE))
        )
        await asyncio.to_thread(server.wait_until, lambda info: info["active"] == 2)
        one.cancel()
        await asyncio.to_thread(server.wait_until, lambda info: info["active"] == 1)
        assert len((await other).token_ids) == WHILE


def test_a_server_that_is_told_to_stop_ends_its_lanes_and_itself(folder, model):
    server = Server(command(Torch(), 0, model), folder / "stopped.log")
    try:
        with connected(server) as connection:
            connection.say(ask(0, max_tokens=ENDLESS))
            server.wait_until(lambda info: info["active"] == 1)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                connection.hear()
        assert server.process.wait(timeout=60) == 0, server.log.read_text()
        assert time.monotonic() - started < 30
    finally:
        server.kill()
