"""One attempt of `sft` or `rl`, from the plan to the closing summary."""

import contextlib
import socket
import sys
import threading
import time
from collections import Counter
from typing import IO, Any

import msgspec

from ratchet import address, config_io, durable, metrics
from ratchet.attempts import Outcome
from ratchet.config import InferenceConfig, RLConfig, RunConfig, SFTConfig
from ratchet.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED
from ratchet.launch import devices, early
from ratchet.launch.births import Nursery
from ratchet.launch.early import Begun
from ratchet.launch.nodes import ranks_of
from ratchet.launch.opening import Attempt, Check, open_attempt
from ratchet.launch.preflight import disk_warning
from ratchet.launch.supervisor import Supervisor
from ratchet.launch.tracking import Tracking
from ratchet.report import page, rollouts
from ratchet.report.console import Console

TOKENIZER_TRIES = 600


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that a child inherits: no other process can take the port in between. Raises: Refusal"""
    server = address.listen(host, port)
    server.set_inheritable(True)
    return server


def run(
    kind: str,
    config: RunConfig,
    roles: tuple[str, ...],
    check: Check,
    begun: Begun | None = None,
) -> int:
    """Run one attempt of `sft` or `rl` to its exit code, with the nursery that has begun, or one that begins now."""
    with contextlib.ExitStack() as held:
        nursery = _open_nursery(config, roles, held, begun)  # it imports while the run is opened
        opened = open_attempt(kind, config, check)
        if isinstance(opened, Attempt):
            return _carry_out(opened, roles, nursery)
    for message in opened.messages:
        sys.stderr.write(f"{message}\n")
    return EXIT_OK


def _carry_out(opened: Attempt, roles: tuple[str, ...], nursery: Nursery | None) -> int:
    """Run an attempt that is open, and close it."""
    config, kind = opened.config, opened.record.kind
    log = (opened.paths.attempt(opened.record.attempt) / "launcher.log").open("a")
    console = Console(opened.paths, kind, config.max_steps, log, begins_at=opened.record.plan.step)
    _greet(console, opened)
    supervisor, tracking = Supervisor(opened, console, nursery=nursery), Tracking(opened)
    supervisor.stopping.install()
    try:
        with console, contextlib.ExitStack() as held:
            _start_children(supervisor, config, roles, held)
            tracking.start()
            _prepare_report(opened)
            code, reason = supervisor.run()
            console.end(Outcome(code, reason))
    except BaseException as error:
        supervisor.kill()
        tracking.kill()
        opened.close(EXIT_CRASH, f"launcher: {error!r}")
        raise
    if said := tracking.finish():
        console.say(said)
    _write_report(console, opened, Outcome(code, reason))
    opened.close(code, reason, others_go_on="orchestrator" not in roles)
    _say_goodbye(console, opened, code, log)
    return code


def _prepare_report(opened: Attempt) -> None:
    """Read the tokenizer while the run goes on: a large one would hold up its end."""
    if opened.config.report.enabled:
        settings = config_io.dump(opened.config)
        threading.Thread(target=_read_tokenizer, args=(opened, settings), daemon=True).start()


def _read_tokenizer(opened: Attempt, settings: dict[str, Any]) -> None:
    """It may come only with the first published policy, where the model is one of a hub."""
    for _ in range(TOKENIZER_TRIES):
        if rollouts.load_tokenizer(opened.paths, settings) is not None:
            return
        time.sleep(1)


def _write_report(console: Console, opened: Attempt, outcome: Outcome) -> None:
    """Leave a page about the run. How a run ended is never changed by what fails here."""
    if not opened.config.report.enabled:
        return
    try:
        page.write_last(opened.paths, msgspec.structs.replace(opened.record, outcome=outcome))
    except Exception as error:  # a defect here must not turn a finished run into a failed one
        console.say(f"No report was written ({error!r}); `ratchet report {opened.paths.root}` tries again.")


def _greet(console: Console, opened: Attempt) -> None:
    record = opened.record
    for message in record.plan.messages or ("Starting at step 0.",):
        console.say(f"Attempt {record.attempt} in {opened.paths.root}: {message}")
    for change in record.announced:
        console.say(f"Changed: {change}")
    if isinstance(opened.config, SFTConfig | RLConfig) and (others := opened.config.trainer.nnodes - 1):
        console.say(
            f"Waiting for {others} more node{'s' * (others > 1)}: the same command with --trainer.node-rank "
            f"{'1' if others == 1 else f'1 to {others}'}."
        )
    if warning := disk_warning(opened.config):
        console.say(f"Warning: {warning}")


def _open_nursery(
    config: RunConfig, roles: tuple[str, ...], held: contextlib.ExitStack, begun: Begun | None
) -> Nursery | None:
    """For the trainer and our own servers; vLLM's are programs of another kind."""
    own = [role for role in roles if role in early.MODULES]
    if not isinstance(config, RLConfig) or config.inference is None or config.inference.engine == "vllm":
        own = ["trainer"]
    try:
        begun = begun or early.begin([early.MODULES[role] for role in own], [str(config.output_dir)])
        held.callback(begun.close)
        nursery = Nursery(own, begun)
    except OSError:
        return None
    held.callback(nursery.close)
    return nursery


def _start_children(
    supervisor: Supervisor, config: RunConfig, roles: tuple[str, ...], held: contextlib.ExitStack
) -> None:
    """Start every role; `held` keeps the servers' sockets open, so that a restarted one has the same port."""
    if isinstance(config, SFTConfig | RLConfig):
        supervisor.start("trainer", threads=config.trainer.threads, ranks=ranks_of(config.trainer))
    if not isinstance(config, RLConfig):
        return
    arguments = ("--base-url", *config.orchestrator.client.base_url)
    if "inference" in roles and config.inference is not None:
        urls = _start_servers(supervisor, config.inference, held)
        arguments = ("--base-url", *urls, "--own-server")
    if "orchestrator" in roles:
        supervisor.start("orchestrator", *arguments)


def _start_servers(
    supervisor: Supervisor, settings: InferenceConfig, held: contextlib.ExitStack
) -> list[str]:
    """Start the replicas, each on a port of its own; returns their URLs."""
    urls = []
    for replica, name in enumerate(settings.names):
        server = held.enter_context(listen(settings.host, 0))
        fd = server.fileno()
        supervisor.start(
            "inference",
            *("--fd", str(fd), "--name", name),
            name=name,
            threads=settings.threads,
            fds=(fd,),
            environment=devices.environment(settings, replica),
        )
        urls.append(address.url(server))
    return urls


def _say_goodbye(console: Console, opened: Attempt, code: int, log: IO[str]) -> None:
    if code == EXIT_OK:
        console.summarize(restarts=Counter(restart.role for restart in opened.record.restarts))
    elif code == EXIT_STOPPED:
        rows = metrics.read(opened.paths.metric("trainer"))
        step = rows[-1]["step"] if rows else opened.record.plan.step
        saved = max(durable.committed(opened.paths.checkpoints), default=0)
        why = "no checkpoint was asked for" if opened.config.ckpt is None else "none was saved yet"
        where = f"continues at step {saved}" if saved else f"starts at step 0: {why}"
        console.say(f"Stopped after step {step}. The same command {where}.")
    log.close()
