"""From a command to an exit code: lock, plan, children, first failure stops all.

    open_attempt    lock ─► finish an open intent ─► plan ─► record ─► apply
    supervise       start the children, watch them, pass on signals, close the attempt

Who may end first: a trainer that reached max_steps (the orchestrator still plays the last evaluation),
or an orchestrator that has emitted the last batch. Inference never; it is stopped last.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec

from ratchet import attempts, durable, metrics, resume
from ratchet import config as configs
from ratchet.attempts import Lock, Outcome, Plan, Record
from ratchet.config import OnResume, RLConfig, RunConfig, SFTConfig
from ratchet.durable import Stage
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, Refusal
from ratchet.paths import RunPaths
from ratchet.report.console import Console

POLL_S = 0.05
GRACE_S = 20.0
LAST_LINES = 15


@dataclass
class Attempt:
    """An open attempt: the launcher holds the lock and its own workshop."""

    paths: RunPaths
    lock: Lock
    stage: Stage
    record: Record
    config: RunConfig

    def close(self, code: int, reason: str) -> None:
        """Record the outcome and leave no workshop behind."""
        self.record = attempts.write(
            self.stage, msgspec.structs.replace(self.record, outcome=Outcome(code, reason))
        )
        durable.revoke(self.paths, by=self.stage)
        shutil.rmtree(self.stage.directory)
        self.lock.release()


def open_attempt(kind: str, config: RunConfig, check: Callable[[], None]) -> Attempt | Plan:
    """Take the lock, plan and apply; or return the plan of a run that is complete already.

    `check` raises a Refusal for input that no program could use; it runs when there is work to be done.

    Raises: Refusal, before anything of the run was touched.
    """
    paths = RunPaths(config.output_dir)
    _make_root(paths)
    lock = Lock(paths)
    lock.acquire()
    last = attempts.newest(paths)
    number = _next_number(paths)
    stage = Stage.open(paths, attempts.token(number, "launcher", 0))
    try:
        durable.revoke(paths, by=stage)
        if last is not None and not last.applied:
            last = _carry_out(stage, last)
        chosen, announced = _decide(kind, paths, config, last)
        if not chosen.complete:
            check()
            record = _begin(stage, kind, config, number, last, chosen, announced)
            return Attempt(paths, lock, stage, _carry_out(stage, record), config)
    except BaseException:
        shutil.rmtree(stage.directory, ignore_errors=True)
        lock.release()
        raise
    shutil.rmtree(stage.directory)
    lock.release()
    return chosen


def _make_root(paths: RunPaths) -> None:
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        paths.staging.mkdir(exist_ok=True)
    except OSError as error:
        raise Refusal(
            f"The run directory {paths.root} cannot be written ({error.strerror}): choose another --output-dir."
        ) from None


def _next_number(paths: RunPaths) -> int:
    """Above every number that an attempt or a workshop ever had, so that no token is used twice."""
    names = [*_names(paths.attempts), *_names(paths.staging)]
    return 1 + max((int(n[:3]) for n in names if n[:3].isdigit()), default=0)


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.exists() else []


def _decide(
    kind: str, paths: RunPaths, config: RunConfig, last: Record | None
) -> tuple[Plan, tuple[str, ...]]:
    announced: tuple[str, ...] = ()
    is_same = False
    if last is not None:
        if last.kind != kind:
            raise Refusal(f"{paths.root} holds a run of `{last.kind}`: give this one another --output-dir.")
        old = attempts.read_config(paths, last)
        is_same = configs.dump(old) == configs.dump(config)
        announced = _check_changes(old, config)
    ckpt = config.ckpt
    request = resume.Request(
        kind=kind,
        max_steps=config.max_steps,
        resume_step=ckpt.resume_step if ckpt else None,
        has_run=last is not None,
        is_same=is_same,
        was_finished=last is not None and last.outcome is not None and last.outcome.code == EXIT_OK,
        on_corrupt=ckpt.on_corrupt if ckpt else "stop",
    )
    return resume.decide(paths, request), announced


def _check_changes(old: RunConfig, new: RunConfig) -> tuple[str, ...]:
    """What is said aloud about a changed configuration. Raises: Refusal for a fixed key."""
    found = configs.changes(old, new)
    fixed = [str(change) for change in found if change.mark is OnResume.FIXED]
    if fixed and new.ckpt is not None and new.ckpt.resume_step is not None:
        raise Refusal(
            f"A resumed run may not change {'; '.join(fixed)}: restore the old value, "
            "or start a new run with another --output-dir."
        )
    return tuple(str(change) for change in found if change.mark is OnResume.ANNOUNCED)


def _begin(
    stage: Stage,
    kind: str,
    config: RunConfig,
    number: int,
    last: Record | None,
    chosen: Plan,
    announced: tuple[str, ...],
) -> Record:
    """Commit the intent: the attempt's configuration, then its record with the plan."""
    paths = stage.paths
    environment = attempts.environment()
    if last is not None:
        announced += tuple(
            f"{name}: {old} -> {environment.get(name)}"
            for name, old in last.environment.items()
            if environment.get(name) != old
        )
    paths.attempt(number).mkdir(parents=True, exist_ok=True)
    stage.replace(paths.attempt(number) / "run.toml", configs.to_toml(config))
    lineage = last.lineage if last else 0
    record = Record(
        attempt=number,
        kind=kind,
        run_id=last.run_id if last else secrets.token_hex(6),
        lineage=lineage + 1 if chosen.rollback else lineage,
        argv=attempts.argv(),
        resume_step=config.ckpt.resume_step if config.ckpt else None,
        plan=chosen,
        announced=announced,
        environment=environment,
    )
    return attempts.write(stage, record)


def _carry_out(stage: Stage, record: Record) -> Record:
    """Apply the plan of a record and say so in it; the second half of a start, or of one that died."""
    paths = stage.paths
    for directory in (
        paths.batches,
        paths.weights,
        paths.checkpoints,
        paths.evals,
        paths.metrics,
        paths.superseded,
    ):
        directory.mkdir(exist_ok=True)
    resume.apply(stage, record.plan, record.attempt)
    stage.replace(paths.run_file, (paths.attempt(record.attempt) / "run.toml").read_bytes())
    return attempts.write(stage, msgspec.structs.replace(record, applied=True))


@dataclass
class Child:
    """One program of the run."""

    role: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


@dataclass
class Supervisor:
    """Starts, watches and stops the children of one attempt."""

    attempt: Attempt
    console: Console
    children: dict[str, Child] = field(default_factory=dict)
    stop_requests: int = 0

    def start(self, role: str, *arguments: str, threads: int = 1, fds: tuple[int, ...] = ()) -> None:
        """Start `python -m ratchet.<role> RUN ATTEMPT INCARNATION`; its output goes to the attempt's log."""
        number = self.attempt.record.attempt
        log = self.attempt.paths.attempt(number) / f"{role}.log"
        command = [sys.executable, "-m", f"ratchet.{role}", str(self.attempt.paths.root), str(number), "1"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(threads),
                pass_fds=fds,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which decides
            )
        self.children[role] = Child(role, process, log)

    def install_signal_handlers(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_requests += 1

    def run(self) -> tuple[int, str]:
        """Watch until every program has done its work; returns the exit code and the reason."""
        asked = False
        while True:
            self.console.refresh()
            if self.stop_requests > 1:
                self.kill()
                return EXIT_STOPPED, "stopped at once by a second signal"
            if self.stop_requests and not asked:
                self.console.say("Stopping after this step; once more to stop at once.")
                self.signal("trainer", signal.SIGTERM)
                asked = True
            codes = {role: child.process.poll() for role, child in self.children.items()}
            if (verdict := self._judge(codes, asked)) is not None:
                self.console.refresh()
                return verdict
            time.sleep(POLL_S)

    def _judge(self, codes: dict[str, int | None], asked: bool) -> tuple[int, str] | None:
        """What the exit codes so far mean: None while there is work to be done."""
        workers = {role: code for role, code in codes.items() if role != "inference"}
        for role, code in codes.items():
            if asked and role == "trainer" and code == EXIT_STOPPED:
                self.stop_all()
                return EXIT_STOPPED, "stopped on request"
            ended_early = code is not None and (code != EXIT_OK or role == "inference")
            if ended_early:
                self.stop_all()
                return self._failure(role, code or EXIT_CRASH)
        if all(code == EXIT_OK for code in workers.values()):
            self.stop_all()
            return EXIT_OK, "complete"
        return None

    def _failure(self, role: str, code: int) -> tuple[int, str]:
        child = self.children[role]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        reason = f"{role} {how}"
        self.console.say(f"The {reason}; its last lines ({child.log}):\n{child.tail()}")
        return code if code > 0 else EXIT_CRASH, reason

    def signal(self, role: str, number: int) -> None:
        child = self.children.get(role)
        if child is not None and child.process.poll() is None:
            child.process.send_signal(number)

    def stop_all(self) -> None:
        """Ask everyone, the trainer first because it may save; insist after the grace period."""
        for role in ("trainer", "orchestrator", "inference"):
            self.signal(role, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(c.process.poll() is None for c in self.children.values()):
            self.console.refresh()
            time.sleep(POLL_S)
        self.kill()

    def kill(self) -> None:
        for child in self.children.values():
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


def child_environment(threads: int) -> dict[str, str]:
    """Fixed thread counts, and who the parent is (see `process.die_with_parent`)."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {name: str(threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "RATCHET_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that a child inherits: no other process can take the port in between."""
    server = socket.create_server((host, port))
    server.set_inheritable(True)
    return server


def run(kind: str, config: RunConfig, roles: tuple[str, ...], check: Callable[[], None]) -> int:
    """Run one attempt of `sft` or `rl` to its exit code."""
    opened = open_attempt(kind, config, check)
    if isinstance(opened, Plan):
        for message in opened.messages:
            sys.stderr.write(f"{message}\n")
        return EXIT_OK
    log = (opened.paths.attempt(opened.record.attempt) / "launcher.log").open("a")
    console = Console(opened.paths, kind, config.max_steps, log)
    _greet(console, opened)
    supervisor = Supervisor(opened, console)
    supervisor.install_signal_handlers()
    try:
        with console:
            _start_children(supervisor, config, roles)
            code, reason = supervisor.run()
    except BaseException as error:
        supervisor.kill()
        opened.close(EXIT_CRASH, f"launcher: {error!r}")
        raise
    opened.close(code, reason)
    _say_goodbye(console, opened, code, log)
    return code


def _greet(console: Console, opened: Attempt) -> None:
    record = opened.record
    for message in record.plan.messages or ("Starting at step 0.",):
        console.say(f"Attempt {record.attempt} in {opened.paths.root}: {message}")
    for change in record.announced:
        console.say(f"Changed: {change}")


def _start_children(supervisor: Supervisor, config: RunConfig, roles: tuple[str, ...]) -> None:
    if isinstance(config, SFTConfig | RLConfig):
        supervisor.start("trainer", threads=config.trainer.threads)
    if not isinstance(config, RLConfig):
        return
    url = config.orchestrator.client.base_url
    if "inference" in roles and config.inference is not None:
        with listen(config.inference.host, 0) as server:
            fd = server.fileno()
            supervisor.start("inference", "--fd", str(fd), threads=config.inference.threads, fds=(fd,))
            host, port = server.getsockname()[:2]
            url = f"http://{host}:{port}"
    if "orchestrator" in roles:
        supervisor.start("orchestrator", "--base-url", url)


def _say_goodbye(console: Console, opened: Attempt, code: int, log: IO[str]) -> None:
    if code == EXIT_OK:
        console.summarize()
    elif code == EXIT_STOPPED:
        rows = metrics.read(opened.paths.metric("trainer"))
        step = rows[-1]["step"] if rows else opened.record.plan.step
        console.say(f"Stopped after step {step}. The same command continues.")
    log.close()
