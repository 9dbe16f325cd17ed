"""Orchestrator and inference on machines of their own: members of whichever attempt the trainer has open.

    trainer        opens attempt n ─► stops or is moved ─► opens attempt n+1 ...
    a member       waits for an open attempt ─► takes its role over ─► works until it closes ─► waits for the next
    inference      says where it listens in its workshop, staging/<n>.inference.<i>/address.json
    orchestrator   goes to the newest of each server; starts again when another one takes its place, or joins

Several servers are called inference_0, inference_1, ...: each has workshops of its own. An address vanishes with the
workshop when the attempt is replaced, so one that is found is never of another time.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ratchet import address, attempts, config_io, durable
from ratchet.attempts import Record
from ratchet.config import RLConfig
from ratchet.errors import EXIT_CRASH, EXIT_FENCED, EXIT_OK, EXIT_STOPPED, Fenced, Refusal
from ratchet.launch import restarts
from ratchet.launch.early import child_environment
from ratchet.launch.join import newest, take_over
from ratchet.launch.run import listen
from ratchet.log import LOGGER
from ratchet.paths import RunPaths
from ratchet.stage import Stage

POLL_S = 0.2
ADDRESS = "address.json"
GATHER_S = 10.0
"""How long the first of several servers waits for the others, before the run begins without them."""


class Address(msgspec.Struct, frozen=True):
    """Where an inference server listens."""

    url: str


def publish(paths: RunPaths, token: str, url: str) -> None:
    """Say in a server's workshop where it listens. Raises: Fenced"""
    workshop = Stage(paths, token)
    path = workshop.directory / ADDRESS
    workshop.create(path, msgspec.json.encode(Address(url)))
    durable.fsync_path(path)
    durable.fsync_path(path.parent)


def find_address(paths: RunPaths, attempt: int, name: str = "inference") -> str | None:
    """The address of the newest server of that name in an attempt; None before one has said it."""
    prefix = attempts.token(attempt, name, 0)[:-1]
    found = [name for name in _listed(paths.staging) if name.startswith(prefix)]
    for name in sorted(found, key=lambda n: int(n.rpartition(".")[2]), reverse=True):
        try:
            return msgspec.json.decode((paths.staging / name / ADDRESS).read_bytes(), type=Address).url
        except FileNotFoundError:
            continue
    return None


def find_addresses(paths: RunPaths, attempt: int, names: tuple[str, ...]) -> list[str]:
    """The addresses of those servers that have said theirs, in the order of the names."""
    found = (find_address(paths, attempt, name) for name in names)
    return [url for url in found if url is not None]


def _listed(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


class Member:
    """One program of a run, in whatever attempt is open. Of several servers each has a name."""

    def __init__(
        self, config: RLConfig, role: str, wait_s: float, threads: int, name: str | None = None
    ) -> None:
        self.config = config
        self.role = role
        self.name = name or role
        self.paths = RunPaths(config.output_dir)
        self._wait_s = wait_s
        self._threads = threads
        self.is_asked = False
        self._child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.is_asked = True
        if self._child is not None:
            self._child.terminate()

    def stay(self, work: Callable[[Record, int], int]) -> int:
        """Work in one attempt after the other, until the run is complete or nothing more comes.

        Raises: Refusal if no attempt opens in time.
        """
        restarted_at: list[float] = []
        while (record := self._wait_for_attempt()) is not None:
            try:
                code = work(record, take_over(self.paths, record, self.name))
            except Fenced:
                code = EXIT_STOPPED  # the attempt closed meanwhile
            if self.is_asked:
                break
            if code == EXIT_OK:
                return EXIT_OK
            if code in (EXIT_STOPPED, EXIT_FENCED):
                continue
            verdict = restarts.judge(self.config.launch, code, restarted_at, time.monotonic())
            if verdict.delay_s is None:
                LOGGER.error("the %s ended with exit code %d; %s", self.name, code, verdict.why)
                return code
            restarted_at.append(time.monotonic())
            time.sleep(verdict.delay_s)
        return EXIT_STOPPED if self.is_asked else EXIT_OK

    def _wait_for_attempt(self) -> Record | None:
        """The open attempt; None when there will be none: the run is complete, or this program was asked to stop."""
        deadline = time.monotonic() + self._wait_s
        while not self.is_asked:
            record = newest(self.paths)
            if record is not None and record.applied and record.outcome is None:
                return record
            if record is not None and record.outcome is not None and record.outcome.code == EXIT_OK:
                config = attempts.read_config(self.paths, record)
                if config_io.is_same(config, self.config):
                    return None
            if time.monotonic() > deadline:
                raise Refusal(
                    f"No attempt was open in {self.paths.root} for {self._wait_s:g} s (slurm.wait_s), so the "
                    f"{self.name} ends: run the same command again."
                )
            time.sleep(POLL_S)
        return None

    def run(self, record: Record, incarnation: int, *arguments: str, is_over: Callable[[], bool]) -> int:
        """Run the program until it ends, until the attempt is closed without success, or until `is_over`."""
        command = [sys.executable, "-m", f"ratchet.{self.role}", str(self.paths.root)]
        command += [str(record.attempt), str(incarnation), *arguments]
        fds = [int(arguments[1])] if arguments[0] == "--fd" else []
        self._child = subprocess.Popen(
            command, env=child_environment(self._threads), start_new_session=True, pass_fds=fds
        )
        LOGGER.info("%s of attempt %d of %s", self.role, record.attempt, self.paths.root)
        try:
            while (code := self._child.poll()) is None:
                if self._has_failed(record) or is_over():
                    self._child.terminate()
                    self._child.wait()
                    return EXIT_STOPPED
                time.sleep(POLL_S)
            return code if code >= 0 else EXIT_CRASH
        finally:
            self._child = None

    def _has_failed(self, record: Record) -> bool:
        current = newest(self.paths)
        if current is None or current.attempt != record.attempt:
            return True
        return current.outcome is not None and current.outcome.code != EXIT_OK


def orchestrate(config: RLConfig, wait_s: float) -> int:
    """Be the orchestrator of a run; its server is where the run directory says."""
    member = Member(config, "orchestrator", wait_s, threads=1)

    def work(record: Record, incarnation: int) -> int:
        urls = config.orchestrator.client.base_url
        names = config.inference.names if config.inference is not None else ()
        if names:
            urls = _wait_for_addresses(member, record, names, wait_s)
            if not urls:
                return EXIT_STOPPED

        def has_moved() -> bool:
            return not set(find_addresses(member.paths, record.attempt, names)) <= set(urls)

        own = ["--own-server"] if names else []
        code = member.run(record, incarnation, "--base-url", *urls, *own, is_over=has_moved)
        if code == EXIT_OK:  # tells inference that nobody needs it any more
            token = attempts.token(record.attempt, "orchestrator", incarnation)
            shutil.rmtree(member.paths.staging / token, ignore_errors=True)
        return code

    return member.stay(work)


def _wait_for_addresses(member: Member, record: Record, names: tuple[str, ...], wait_s: float) -> list[str]:
    """Where inference listens: all servers, or those that are there a while after the first.

    Empty if the attempt closes first, or the wait is broken off. Raises: Refusal
    """
    paths, deadline = member.paths, time.monotonic() + wait_s
    latest = deadline
    while len(urls := find_addresses(paths, record.attempt, names)) < len(names):
        current = newest(paths)
        is_open = current is not None and current.attempt == record.attempt and current.outcome is None
        if member.is_asked or not is_open:
            return []
        latest = min(latest, time.monotonic() + GATHER_S) if urls else deadline
        if urls and time.monotonic() > latest:
            break
        if time.monotonic() > deadline:
            raise Refusal(
                f"No inference server came to attempt {record.attempt} of {paths.root} within {wait_s:g} s "
                "(slurm.wait_s): see the log of its job, then run the same command again."
            )
        time.sleep(POLL_S)
    return urls


def serve(config: RLConfig, name: str, wait_s: float, host: str) -> int:
    """Be an inference server of a run."""
    assert config.inference is not None
    member = Member(config, "inference", wait_s, threads=config.inference.threads, name=name)

    def work(record: Record, incarnation: int) -> int:
        with _listening(host) as (server, url):
            publish(member.paths, attempts.token(record.attempt, name, incarnation), url)
            given = ("--fd", str(server.fileno()), "--name", name)
            code = member.run(record, incarnation, *given, is_over=lambda: _is_done(member.paths, record))
        return EXIT_OK if _is_done(member.paths, record) else code or EXIT_CRASH

    return member.stay(work)


def _is_done(paths: RunPaths, record: Record) -> bool:
    """Whether a run ended well and its orchestrator, which may still have played an evaluation, too."""
    current = newest(paths)
    if current is None or current.attempt != record.attempt or current.outcome is None:
        return False
    prefix = attempts.token(record.attempt, "orchestrator", 0)[:-1]
    return current.outcome.code == EXIT_OK and not any(n.startswith(prefix) for n in _listed(paths.staging))


@contextmanager
def _listening(host: str) -> Iterator[tuple[socket.socket, str]]:
    """A free port, and the address by which other machines reach it."""
    with listen(host, 0) as server:
        yield server, address.url(server, everywhere=socket.gethostname())
