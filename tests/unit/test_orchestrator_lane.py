"""The client's lane, against real servers on loopback that answer as each test says."""

import asyncio
import gc
import socket
import weakref

import pytest
from aiohttp import WSMsgType, web

from ratchet import lane
from ratchet.errors import RatchetError
from ratchet.lane import Answer, Ask, Drop, Failure
from ratchet.orchestrator.calls import Answered, Request, Torn
from ratchet.orchestrator.client import Client


class Server:
    """Hears frames; a test says what is answered, and when."""

    def __init__(self):
        self.frames = []
        self.heard = asyncio.Event()
        self.sockets = []
        self.asked_alone = 0
        self.lane = lane.VERSION
        self.serves_lane = True

    async def start(self):
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/weight_info", self.info)
        app.router.add_post("/inference/v1/generate", self.generate)
        app.router.add_get(lane.PATH, self.talk)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def models(self, request):
        return web.json_response({"data": [{"id": "null"}]})

    async def info(self, request):
        return web.json_response({"weight_version": "a", "paused": False, "lane": self.lane})

    async def generate(self, request):
        self.asked_alone += 1
        seed = (await request.json())["sampling_params"]["seed"]
        spans = [{"version": "a", "start": 0, "end": 1}]
        logprobs = {"content": [{"logprob": -1.0}]}
        choice = {
            "token_ids": [seed],
            "finish_reason": "stop",
            "logprobs": logprobs,
            "weight_versions": spans,
        }
        return web.json_response({"choices": [choice]})

    async def talk(self, request):
        if not self.serves_lane:
            raise web.HTTPNotFound
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        self.sockets.append(ws)
        while (message := await ws.receive()).type is WSMsgType.BINARY:
            self.frames.append(lane.decode_asked(message.data))
            self.heard.set()
        return ws

    async def frame(self, index):
        """What came in the frame of this number, waited for."""
        async with asyncio.timeout(10):
            while len(self.frames) <= index:
                self.heard.clear()
                await self.heard.wait()
        return self.frames[index]

    async def say(self, *messages):
        await self.sockets[-1].send_bytes(lane.encode(list(messages)))


@pytest.fixture
async def server():
    made = Server()
    await made.start()
    yield made
    await made.runner.cleanup()


async def meet(server, **more):
    """A client that has looked at the server, as the pool does before it uses one."""
    client = Client(server.url, **({"timeout_s": 20, "concurrency": 8} | more))
    await client.__aenter__()
    await client.connect()
    await client.weight_info()
    return client


@pytest.fixture
async def client(server):
    found = await meet(server)
    yield found
    await found.__aexit__()


def request(seed):
    return Request(token_ids=[5, 6], seed=seed, max_tokens=4, temperature=0.5, stop_token_ids=[1])


def ask(client, *seeds):
    """Requests of one turn of the event loop."""
    return [asyncio.create_task(client.generate(request(seed))) for seed in seeds]


def answer(id, token, **changes):
    fields = {"logprobs": [-0.5], "versions": [("a", 0, 1)], "finish_reason": "stop"} | changes
    return Answer(id, [token], **fields)


async def test_what_is_asked_in_one_turn_is_one_frame_with_all_that_a_token_depends_on(server, client):
    asked = ask(client, 10, 11, 12)
    frame = await server.frame(0)
    assert frame == [Ask(i, [5, 6], 10 + i, 4, 0.5, [1]) for i in range(3)]
    await server.say(answer(2, 22), answer(0, 20))
    done, _ = await asyncio.wait(asked, timeout=0.5)
    assert done == {asked[0], asked[2]}, "nobody waits for the others"
    await server.say(answer(1, 21))
    assert [(await one).token_ids for one in asked] == [[20], [21], [22]]
    assert [span.version for span in (await asked[0]).versions] == ["a"]
    later = ask(client, 13)
    assert [message.id for message in await server.frame(1)] == [3]
    assert len(server.sockets) == 1
    await server.say(answer(3, 23))
    assert (await later[0]).token_ids == [23]
    assert server.asked_alone == 0


async def test_the_failure_of_one_is_that_ones_alone(server, client):
    asked = ask(client, 0, 1, 2, 3)
    await server.frame(0)
    await server.say(
        Failure(0, 400, "too long"),
        Failure(1, 503, "stopping"),
        answer(2, 22, finish_reason="abort"),
        answer(3, 23),
    )
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(found[0], Answered)
    assert (found[0].status, found[0].sentence) == (400, "too long")
    assert [(type(error), error.cause) for error in found[1:3]] == [(Torn, "status"), (Torn, "answer")]
    assert found[3].token_ids == [23]


async def test_an_answer_that_does_not_label_every_token_is_no_answer(server, client):
    (asked,) = ask(client, 0)
    await server.frame(0)
    await server.say(answer(0, 20, versions=[]))
    with pytest.raises(RatchetError, match="each token needs both"):
        await asked


async def test_a_torn_connection_tears_what_had_not_arrived_and_nothing_else(server, client):
    asked = ask(client, 0, 1, 2)
    await server.frame(0)
    await server.say(answer(1, 21))
    assert (await asked[1]).token_ids == [21]
    server.sockets[0]._req.transport.abort()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [error.cause for error in (found[0], found[2])] == ["connection"] * 2
    assert found[0] is not found[2]
    again = ask(client, 0, 2)
    # The new connection is asked for these two alone.
    assert [(message.id, message.seed) for message in await server.frame(1)] == [(0, 0), (1, 2)]
    await server.say(answer(0, 20), answer(1, 22))
    assert [(await one).token_ids for one in again] == [[20], [22]]


async def test_a_server_that_closes_the_lane_tears_it(server, client):
    (asked,) = ask(client, 0)
    await server.frame(0)
    await server.sockets[0].close()
    with pytest.raises(Torn, match="closed"):
        await asked


async def test_a_cancelled_request_is_dropped_at_the_server_and_its_late_answer_is_nobodys(server, client):
    asked = ask(client, 0, 1)
    await server.frame(0)
    asked[0].cancel()
    assert await server.frame(1) == [Drop(0)]
    await server.say(answer(0, 20), answer(1, 21))
    assert (await asked[1]).token_ids == [21]
    assert asked[0].cancelled()


async def test_what_waits_too_long_is_torn_and_dropped_and_later_requests_are_not(server):
    client = await meet(server, timeout_s=0.6)
    early = ask(client, 0, 1)
    await server.frame(0)
    await server.say(answer(1, 21))
    await asyncio.sleep(0.4)
    late = ask(client, 2)
    with pytest.raises(Torn) as torn:
        await early[0]
    assert torn.value.cause == "timeout"
    assert await server.frame(2) == [Drop(0)]
    await server.say(answer(2, 22))
    assert (await late[0]).token_ids == [22]
    await client.__aexit__()


async def test_a_lane_over_which_nothing_comes_is_given_up_and_the_next_request_has_a_new_connection(server):
    """Something on the way has forgotten the connection: neither side is told."""
    client = await meet(server, timeout_s=0.5)
    early = ask(client, 0)
    await server.frame(0)
    await asyncio.sleep(0.3)
    late = ask(client, 1)
    found = await asyncio.gather(*early, *late, return_exceptions=True)
    assert [error.cause for error in found] == ["timeout", "timeout"]
    (again,) = ask(client, 2)
    await server.frame(2)
    await server.say(answer(0, 22))
    assert (await again).token_ids == [22]
    await client.__aexit__()


async def test_cut_tears_all_at_once_and_the_next_request_has_a_new_connection(server, client):
    asked = ask(client, 0, 1)
    await server.frame(0)
    client.cut()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [error.cause for error in found] == ["silent", "silent"]
    (again,) = ask(client, 0)
    await server.frame(1)
    await server.say(answer(0, 20))
    assert (await again).token_ids == [20]
    async with asyncio.timeout(5):
        while not server.sockets[0].closed:
            await asyncio.sleep(0.01)


async def test_a_server_that_never_answers_the_handshake_can_be_cut_and_left():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with Client(
            f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=20, concurrency=8
        ) as client:
            client._has_lane = True
            asked = ask(client, 0, 1)
            await asyncio.sleep(0.1)
            client.cut()
            async with asyncio.timeout(5):
                found = await asyncio.gather(*asked, return_exceptions=True)
    assert [error.cause for error in found] == ["silent", "silent"]


async def test_nobody_there_is_a_torn_connection():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with Client(url, timeout_s=20, concurrency=8) as client:
        client._has_lane = True
        found = await asyncio.gather(*ask(client, 0, 1), return_exceptions=True)
    assert [error.cause for error in found] == ["connection", "connection"]


@pytest.mark.parametrize("version", [None, lane.VERSION + 1])
async def test_a_server_without_this_lane_is_asked_by_one_request_each(server, version):
    server.lane = version
    client = await meet(server)
    assert [(await one).token_ids for one in ask(client, 7, 8)] == [[7], [8]]
    assert (server.asked_alone, server.sockets) == (2, [])
    await client.__aexit__()


async def test_where_the_route_is_unknown_after_all_the_same_requests_go_one_by_one(server, client):
    server.serves_lane = False
    assert [(await one).token_ids for one in ask(client, 7, 8, 9)] == [[7], [8], [9]]
    assert server.asked_alone == 3


async def test_something_else_than_frames_stops_the_run(server, client):
    asked = ask(client, 0, 1)
    await server.frame(0)
    await server.sockets[0].send_bytes(b"\xc1")
    found = await asyncio.gather(*asked, return_exceptions=True)
    for error in found:
        assert isinstance(error, RatchetError)
        assert "with something else" in str(error)


async def test_nothing_is_kept_of_what_was_answered(server, client):
    kept = []
    for turn in range(3):
        (asked,) = ask(client, turn)
        await server.frame(turn)
        await server.say(answer(turn, 20))
        kept.append(weakref.ref(asked))
        await asked
    del asked
    await asyncio.sleep(0)  # the loop itself holds what it calls until it has
    gc.collect()
    assert [one() for one in kept] == [None] * 3
    assert client._lane._waiting == {}
    assert client._lane._outbox == []
