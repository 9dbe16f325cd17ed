"""A server that speaks the protocol without a model: its answers are a function of weights, prompt and seed.

It can tear requests, be restarted with other weights, answer late, freeze, and refuse an architecture.
"""

import asyncio
import hashlib
import random
import time
from collections import Counter
from pathlib import Path

from aiohttp import WSMsgType, web

from ratchet import lane

END = 1
FIRST_LETTER, LETTERS = 8, 26


class FakeInference:
    rejection = "temperature must be 7"

    def __init__(self):
        self.version = "default"
        self.is_paused = False
        self.updates: list[str] = []
        self.generated = 0
        self.delay_s = 0.0
        self.tear_every = 0
        self.abort_every = 0
        self.restart_at: set[int] = set()
        self.refuses = ""
        self.rejects = 0
        """The status with which everything that is to be sampled is refused."""
        self.path = ""
        self.knows_paths = True
        """Otherwise it is one from before there was a choice of directories."""
        self.unseen = "\0"
        """It is on another machine: it sees no path with this part in it."""
        self.given: list[tuple[str, bool]] = []
        """The directories that it was told to load, and whether they were there."""
        self.pauses: list[list[float]] = []
        """When each update began, how many requests were open then, and when it ended."""
        self.open = 0
        self.update_delay_s = 0.0
        self.answered_at: list[float] = []
        self.facts = {"slots": 16, "batch_invariant": True, "lane": lane.VERSION}
        self.asked_alone = 0
        """How many answers were asked for by a request of their own."""
        self.max_model_len = 128
        self.seeds: Counter[int] = Counter()
        """How often an answer was sampled from each seed."""
        self.hold_after: int | None = None
        """So many answers are given; what is asked then is never answered."""
        self.served_by_prompt: dict[tuple[int, ...], set[str]] = {}
        self.script: dict[str, list[int]] = {}
        """Statuses with which the next calls of a path are answered instead; 0 restarts the server."""
        self._counter = 0
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def start(self, port=0, host="127.0.0.1"):
        app = web.Application(client_max_size=1 << 26, middlewares=[self.scripted])
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/weight_info", self.weight_info)
        app.router.add_post("/inference/v1/generate", self.generate)
        if "lane" in self.facts:
            app.router.add_get(lane.PATH, self.lane)
        app.router.add_post("/pause", self.pause)
        app.router.add_post("/resume", self.resume)
        app.router.add_post("/update_weights", self.update_weights)
        app.router.add_post("/finish_weight_update", self.finish)
        for name in ("/start_weight_update", "/reset_prefix_cache"):
            app.router.add_post(name, self.nothing)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def stop(self):
        await self._runner.cleanup()

    @web.middleware
    async def scripted(self, request, handler):
        await self._thawed.wait()
        if statuses := self.script.get(request.path):
            if status := statuses.pop(0):
                return web.json_response({"error": {"message": "as scripted"}}, status=status)
            self.restart()
            request.transport.abort()
        return await handler(request)

    async def health(self, request):
        return web.Response()

    async def nothing(self, request):
        return web.json_response({})

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake", "max_model_len": self.max_model_len}]})

    async def weight_info(self, request):
        facts = {"model_type": "qwen3", "hidden_size": 128}
        info = {"weight_version": self.version, "paused": self.is_paused, "architecture_facts": facts}
        return web.json_response(info | self.facts)

    async def pause(self, request):
        assert request.query["mode"] in ("keep", "wait")
        self.is_paused = True
        self.pauses.append([time.monotonic(), self.open])
        self._resumed.clear()
        return web.json_response({})

    async def resume(self, request):
        self.is_paused = False
        self.pauses[-1].append(time.monotonic())
        self._resumed.set()
        return web.json_response({})

    async def update_weights(self, request):
        if self.refuses:
            return web.json_response({"error": {"message": self.refuses}}, status=409)
        info = (await request.json())["update_info"]
        paths = info["paths"] if self.knows_paths else [info["path"]]
        seen = [path for path in paths if self.unseen not in path and Path(path).exists()]
        if not seen and self.knows_paths:
            return web.json_response({"error": {"message": f"sees none of {paths}"}}, status=410)
        self.path = seen[0] if seen else paths[0]
        assert Path(self.path).is_absolute()
        self.given.append((self.path, (Path(self.path) / "config.json").exists()))
        assert self.given[-1][1]
        await asyncio.sleep(self.update_delay_s)
        return web.json_response({})

    async def finish(self, request):
        self.version = (await request.json())["weight_version"]
        self.updates.append(self.version)
        return web.json_response({})

    def freeze(self):
        """What SIGSTOP looks like from outside: connections are accepted, and nothing is answered."""
        self._thawed.clear()

    def thaw(self):
        self._thawed.set()

    def restart(self, version="default"):
        """What a crash and a fresh start look like from outside."""
        self.version = version
        self.is_paused = False
        self._resumed.set()

    async def generate(self, request):
        body = await request.json()
        assert not {"top_p", "top_k"} & set(body["sampling_params"])
        self.asked_alone += 1
        if self.rejects:
            return web.json_response({"error": {"message": self.rejection}}, status=self.rejects)
        sampled = await self.sample(body["token_ids"], body["sampling_params"], request)
        if sampled is None:
            return web.Response()
        token_ids, logprobs, version, finish_reason = sampled
        choice = {
            "token_ids": token_ids,
            "finish_reason": finish_reason,
            "logprobs": {"content": [{"token": "", "logprob": value} for value in logprobs]},
            "weight_versions": [{"version": version, "start": 0, "end": len(token_ids)}],
        }
        return web.json_response({"choices": [choice]})

    async def lane(self, request):
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        tasks: dict[int, asyncio.Task] = {}

        async def play(ask):
            if self.rejects:
                failure = lane.Failure(ask.id, self.rejects, self.rejection)
                await socket.send_bytes(lane.encode([failure]))
                return
            sampling = {name: getattr(ask, name) for name in ("seed", "temperature", "max_tokens")}
            if (sampled := await self.sample(ask.token_ids, sampling, request)) is not None:
                token_ids, logprobs, version, reason = sampled
                versions = [(version, 0, len(token_ids))]
                await socket.send_bytes(
                    lane.encode([lane.Answer(ask.id, token_ids, logprobs, versions, reason)])
                )

        while (message := await socket.receive()).type is WSMsgType.BINARY:
            for said in lane.decode_asked(message.data):
                if isinstance(said, lane.Ask):
                    tasks[said.id] = asyncio.create_task(play(said))
                else:
                    tasks[said.id].cancel()
        for task in tasks.values():
            task.cancel()
        return socket

    async def sample(self, prompt, sampling, request):
        """Tokens, logprobs, version and finish reason; nothing where the connection is torn instead."""
        self.open += 1
        try:
            self._counter += 1
            count = self._counter
            if count in self.restart_at:
                self.restart("another-run/0/0/abc" if count % 2 else "default")
            if self.delay_s:
                await asyncio.sleep(self.delay_s * (count % 3))
            if self.tear_every and count % self.tear_every == 0:
                if request.transport is not None:
                    request.transport.abort()
                return None
            await self._resumed.wait()
            await self._thawed.wait()
            if self.hold_after is not None and self.generated >= self.hold_after:
                await asyncio.Event().wait()
        finally:
            self.open -= 1
        self.generated += 1
        self.answered_at.append(time.monotonic())
        self.seeds[sampling["seed"]] += 1
        token_ids, logprobs = self.answer(prompt, sampling)
        self.served_by_prompt.setdefault(tuple(prompt), set()).add(self.version)
        aborted = self.abort_every and count % self.abort_every == 0
        reason = "abort" if aborted else "stop" if token_ids[-1] == END else "length"
        return token_ids, logprobs, self.version, reason

    def answer(self, prompt, sampling):
        """Letters from a hash of everything that may matter; the run's id may not."""
        weights = "/".join(self.version.split("/")[2:])
        place = repr((weights, prompt, sampling["seed"], sampling["temperature"]))
        rng = random.Random(hashlib.sha256(place.encode()).digest())
        token_ids = [FIRST_LETTER + rng.randrange(LETTERS) for _ in range(rng.randrange(1, 8))]
        token_ids = [*token_ids, END][: sampling["max_tokens"]]
        return token_ids, [-rng.random() for _ in token_ids]
