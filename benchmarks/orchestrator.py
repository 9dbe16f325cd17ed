"""The orchestrator alone: `uv run python benchmarks/orchestrator.py --rollouts 100000 --root DIR`.

The real program plays reverse-text against a null server (a process of its own that answers every request at once
with the same tokens) and a null trainer (this process, which publishes a policy for every batch and deletes what is
old). Each rollout is asked for over the lane (with --http: by an HTTP request of its own), scored, kept in the
journal, credited and published in a batch.

    rollouts per CPU second of the orchestrator    goal: 5 000; the server is not in it
    as many HTTP requests and nothing else         what one request each would cost, measured in the same run
    resident memory at each quarter                goal: flat
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import aiohttp
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from ratchet import attempts, batchlog, checkpoint, lane, metrics, weights
from ratchet.config import RLConfig
from ratchet.launch.opening import Attempt, open_attempt
from ratchet.stage import Stage

MODEL = Path("examples/reverse_text/model")
DATA = Path("examples/reverse_text")
PATH = "/inference/v1/generate"
FACTS = {
    "weight_version": "default",
    "paused": False,
    "slots": 128,
    "batch_invariant": True,
    "lane": lane.VERSION,
}
FIRST_LETTER, END = 8, 1
PARTS = 4


def sampled(tokens: int) -> tuple[list[int], list[float]]:
    """One completion, the same for every prompt."""
    token_ids = [FIRST_LETTER + index % 26 for index in range(tokens - 1)] + [END]
    return token_ids, [-0.1234567890123 - index / 7 for index in range(tokens)]


def answer(version: str, tokens: int) -> bytes:
    token_ids, logprobs = sampled(tokens)
    choice = {
        "index": 0,
        "token_ids": token_ids,
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": logprob} for logprob in logprobs]},
        "weight_versions": [{"version": version, "start": 0, "end": tokens}],
    }
    return response({"request_id": "generate-0123456789abcdef", "choices": [choice]})


def response(value: object) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class NullServer:
    """What the connections share: the weights that were given, and the answer made of their name."""

    def __init__(self, tokens: int, *, has_lane: bool) -> None:
        self._tokens = tokens
        self._has_lane = has_lane
        self._sampled = sampled(tokens)
        self._version = "default"
        self.generated = answer(self._version, tokens)

    def respond(self, path: str, body: bytes) -> bytes:
        if path == "/finish_weight_update":
            self._version = json.loads(body)["weight_version"]
            self.generated = answer(self._version, self._tokens)
        if path == "/weight_info":
            facts = {name: value for name, value in FACTS.items() if name != "lane" or self._has_lane}
            return response(facts | {"weight_version": self._version})
        if path == "/v1/models":
            return response({"data": [{"id": "null", "max_model_len": 1024}]})
        return response({})

    def say(self, frame: bytes) -> bytes:
        """The frame of a lane that answers another one."""
        token_ids, logprobs = self._sampled
        versions = [(self._version, 0, self._tokens)]
        asked = [message for message in lane.decode_asked(frame) if isinstance(message, lane.Ask)]
        return lane.encode([lane.Answer(one.id, token_ids, logprobs, versions, "stop") for one in asked])


class Connected(asyncio.Protocol):
    """One connection: as little HTTP as a client with keep-alive needs, or a lane."""

    def __init__(self, server: NullServer) -> None:
        self._server = server
        self._buffer = b""
        self._lane: ServerProtocol | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._lane is None and data.startswith(b"GET " + lane.PATH.encode()):
            self._lane = ServerProtocol(max_size=None)
        if self._lane is not None:
            self._talk(self._lane, data)
            return
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            start = head.lower().find(b"content-length: ")
            size = int(head[start + 16 :].partition(b"\r")[0]) if start >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            path = head.split(b" ", 2)[1].decode()
            self._transport.write(
                self._server.generated if path == PATH else self._server.respond(path, body)
            )

    def _talk(self, protocol: ServerProtocol, data: bytes) -> None:
        protocol.receive_data(data)
        for event in protocol.events_received():
            if isinstance(event, Request):
                protocol.send_response(protocol.accept(event))
            elif isinstance(event, Frame) and event.opcode is Opcode.BINARY:
                protocol.send_binary(self._server.say(bytes(event.data)))
        for part in protocol.data_to_send():
            self._transport.write(part) if part else self._transport.close()


def serve(tokens: int, has_lane: bool, port: Connection) -> None:
    """The process of the null server."""

    async def forever() -> None:
        null = NullServer(tokens, has_lane=has_lane)
        server = await asyncio.get_running_loop().create_server(lambda: Connected(null), "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(forever())


@contextmanager
def null_server(tokens: int, has_lane: bool) -> Iterator[str]:
    ours, theirs = multiprocessing.Pipe()
    arguments = (tokens, has_lane, theirs)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


async def post(url: str, count: int, concurrency: int) -> None:
    """As many requests as there are rollouts, by the same library, and nothing done with what comes back."""
    sampling = {"max_tokens": 16, "temperature": 1.0, "seed": 2**62, "logprobs": 0, "stop_token_ids": [1]}
    body = json.dumps({"model": "null", "token_ids": [7] * 40, "sampling_params": sampling}).encode()
    left = iter(range(count))

    async def work(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(url + PATH, data=body) as answered:
                await answered.read()

    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(work(session))


class Seen(NamedTuple):
    """The orchestrator's process at one instant."""

    rollouts: int
    at_s: float
    cpu_s: float
    rss_mb: float

    @classmethod
    def of(cls, pid: int, rollouts: int) -> "Seen":
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        rss_mb = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return cls(rollouts, time.monotonic(), cpu_s, rss_mb)


def settings(root: Path, batches: int, arguments: argparse.Namespace) -> RLConfig:
    env = {"id": "reverse_text", "args": {"data": str(DATA / "train.jsonl")}}
    return RLConfig.model_validate(
        {
            "model": {"name": str(MODEL)},
            "output_dir": str(root),
            "max_steps": batches,
            "orchestrator": {
                "env": [env],
                "batch_size": arguments.batch_size,
                "group_size": arguments.group_size,
                "sampling": {"max_tokens": arguments.tokens},
            },
        }
    )


class NullTrainer:
    """Publishes policy k+1 as soon as batch k is there, without reading it."""

    def __init__(self, run: Attempt) -> None:
        self._run = run
        self._stage = Stage.open(run.paths, attempts.token(run.record.attempt, "trainer", 1))

    def publish(self, step: int) -> None:
        directory = self._stage.begin(f"weights_{step}")
        (directory / "config.json").write_bytes((MODEL / "config.json").read_bytes())
        weights.commit(self._stage, directory, step=step, attempt=self._run.record.attempt)

    def follow(self, batch: int, process: "subprocess.Popen[bytes]") -> None:
        while not batchlog.is_ready(self._run.paths, batch):
            assert process.poll() is None, "the orchestrator ended"
            time.sleep(0.002)

    def prune(self, step: int) -> None:
        oldest = batchlog.oldest_served(self._run.paths, step - 1)
        checkpoint.prune(self._stage, None, published=step, oldest_served=oldest, async_level=1)


def play(run: Attempt, url: str, profile: Path | None) -> list[Seen]:
    """One run of the orchestrator, looked at after its first batch and after each quarter."""
    config, number = run.config, run.record.attempt
    assert isinstance(config, RLConfig)
    Stage.open(run.paths, attempts.token(number, "orchestrator", 1))
    command = [sys.executable, "-m", "ratchet.orchestrator"]
    if profile is not None:
        code = (
            "import cProfile, sys; from ratchet.orchestrator.__main__ import main; p = cProfile.Profile(); "
            f"p.runcall(main); p.dump_stats({str(profile)!r})"
        )
        command = [sys.executable, "-c", code]
    trainer, seen, last = NullTrainer(run), [], config.max_steps - 1
    trainer.publish(0)
    with subprocess.Popen([*command, str(run.paths.root), str(number), "1", "--base-url", url]) as process:
        # The last batch is left out: without it the process ends, and is not there to be looked at.
        marks = {0, *((last - 1) * part // PARTS for part in range(1, PARTS + 1))}
        for batch in range(last):
            trainer.follow(batch, process)
            if batch in marks:
                seen.append(Seen.of(process.pid, batch * config.orchestrator.batch_size))
            trainer.publish(batch + 1)
            trainer.prune(batch + 1)
    assert process.returncode == 0, process.returncode
    return seen


def bare(url: str, count: int, concurrency: int) -> float:
    """CPU seconds that the requests alone cost."""
    started = time.process_time()
    asyncio.run(post(url, count, concurrency))
    return time.process_time() - started


def say(what: str, figure: str) -> None:
    sys.stdout.write(f"{what:52} {figure}\n")
    sys.stdout.flush()


def report(seen: list[Seen], run: Attempt, bare_s: float, posted: int) -> None:
    first, end = seen[0], seen[-1]
    count, cpu_s, wall_s = end.rollouts - first.rollouts, end.cpu_s - first.cpu_s, end.at_s - first.at_s
    say("rollouts", f"{count} in {wall_s:.1f} s, of which {cpu_s:.1f} s of the orchestrator's CPU")
    say("rollouts / CPU second of the orchestrator", f"{count / cpu_s:.0f} (goal 5000)")
    say("rollouts / second", f"{count / wall_s:.0f}")
    say("HTTP requests alone / CPU second, same client library", f"{posted / bare_s:.0f}")
    say("orchestrator / HTTP requests alone", f"{cpu_s / count * posted / bare_s:.2f}x the CPU")
    rows = metrics.read(run.paths.metric("orchestrator"))
    env_s = sum(row["time/env_s"] for row in rows[1:])
    say("of it in the environment's own code", f"{env_s / cpu_s:.0%}")
    for before, after in itertools.pairwise(seen):
        rate = (after.rollouts - before.rollouts) / (after.cpu_s - before.cpu_s)
        say(f"  to {after.rollouts} rollouts", f"{rate:.0f} / CPU second, {after.rss_mb:.1f} MB resident")
    say("memory, end / first quarter", f"{end.rss_mb / seen[1].rss_mb:.3f}x (goal: flat)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument(
        "--http", action="store_true", help="one HTTP request a rollout: a server without a lane"
    )
    parser.add_argument("--root", type=Path, help="a directory on the disk to use (default: a temporary one)")
    parser.add_argument("--profile", type=Path, help="run it under cProfile, and put the statistics here")
    arguments = parser.parse_args()
    if arguments.root is not None:
        arguments.root.mkdir(parents=True, exist_ok=True)
    # One batch before the first look, one after the last.
    batches = arguments.rollouts // arguments.batch_size + 2
    with (
        tempfile.TemporaryDirectory(dir=arguments.root) as name,
        null_server(arguments.tokens, not arguments.http) as url,
    ):
        run = open_attempt("rl", settings(Path(name), batches, arguments), lambda seen: None)
        assert isinstance(run, Attempt)
        posted = min(arguments.rollouts, 20_000)
        alone = [bare(url, posted, 256)]
        seen = play(run, url, arguments.profile)
        alone.append(bare(url, posted, 256))
        report(seen, run, sum(alone) / 2, posted)
        run.close(0, "benchmark")


if __name__ == "__main__":
    main()
