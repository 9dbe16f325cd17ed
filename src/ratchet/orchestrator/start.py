"""From a run directory and the URLs of servers to an orchestrator that continues where the log ends."""

import asyncio
import contextlib
import math
import signal
from collections.abc import Sequence

from ratchet import batchlog, checkpoint, durable, heartbeat, resume
from ratchet.attempts import Assignment
from ratchet.chat import Chat
from ratchet.config import RLConfig
from ratchet.envs import registry
from ratchet.envs.base import Environment
from ratchet.errors import RatchetError, Refusal, Stopped
from ratchet.inputs import code, files
from ratchet.inputs.seen import Guard
from ratchet.orchestrator.client import Client
from ratchet.orchestrator.loop import Orchestrator
from ratchet.orchestrator.policies import Policies
from ratchet.orchestrator.pool import Pool
from ratchet.orchestrator.routing import Rules as RoutingRules
from ratchet.orchestrator.scheduler import EnvShare, Rules, Scheduler
from ratchet.orchestrator.target import Target
from ratchet.weights import Places

_SLOTS_UNKNOWN = 256


def rules_of(config: RLConfig, inputs: str = "") -> Rules:
    return Rules(
        inputs=inputs,
        seed=config.seed,
        groups_per_batch=config.orchestrator.groups_per_batch,
        max_steps=config.max_steps,
        max_async_level=config.max_async_level,
        max_off_policy_steps=config.max_off_policy_steps,
        deterministic=config.deterministic,
    )


def routing_rules(config: RLConfig) -> RoutingRules:
    """Twice as many requests as slots keep a server busy; a group's prompt is worth one group's queue."""
    slots = config.inference.slots if config.inference is not None else _SLOTS_UNKNOWN
    return RoutingRules(
        capacity=2 * slots,
        slack=config.orchestrator.group_size,
        slow_start_s=config.orchestrator.client.slow_start_s,
    )


def next_batch(run: Assignment) -> int:
    """The first batch that is not in the log: the plan's, or later where this attempt already went on."""
    return max(run.plan.next_batch, max(durable.steps(run.paths.batches), default=-1) + 1)


def read_state(run: Assignment, batch: int) -> bytes | None:
    """The orchestrator's state before batch `batch`; None at the very start. Raises: Damaged, RatchetError."""
    if batch == 0:
        return None
    directory = run.paths.checkpoint(run.plan.step)
    if batch == run.plan.step and (directory / checkpoint.STATE).exists():
        durable.verify(directory)
        return (directory / checkpoint.STATE).read_bytes()
    last = run.paths.batch(batch - 1)
    if not last.exists():
        raise RatchetError(
            f"The orchestrator's state before batch {batch} is neither in {last} nor in {directory}: "
            "resume from another checkpoint (`ckpt ls` lists them)."
        )
    return batchlog.read_state(last)


def build_scheduler(run: Assignment, envs: dict[str, Environment], inputs: str) -> Scheduler:
    """The scheduler at the place where the log ends, under the inputs of this digest; its rows completed."""
    config: RLConfig = run.config
    shares = [EnvShare(env.label, env.weight, envs[env.label].size) for env in config.orchestrator.env]
    scheduler = Scheduler(rules_of(config, inputs), shares)
    batch = next_batch(run)
    if (state := read_state(run, batch)) is not None:
        scheduler.restore(state)
    if scheduler.next_batch != batch:
        raise RatchetError(
            f"The orchestrator's state is that before batch {scheduler.next_batch}, the log ends before "
            f"batch {batch}: this run directory is not consistent."
        )
    resume.restore_rows(run.stage, batch)
    return scheduler


def places_of(run: Assignment) -> Places:
    """Where this machine sees the policies of a run. Raises: Refusal if it does not see all of them"""
    config: RLConfig = run.config
    if run.memory is None or run.memory.root.is_dir():
        return Places(run.paths, run.memory, are_all_on_disk=config.weights.publish_interval == 1)
    if config.weights.publish_interval > 1:
        raise Refusal(
            f"The orchestrator does not see {run.memory.root}, where policies lie in the memory of the trainer's "
            "machine: start it there, or set weights.publish_interval = 1."
        )
    return Places(run.paths)


async def orchestrate(run: Assignment, base_urls: Sequence[str], *, is_own_server: bool) -> None:
    """Run one incarnation to its end. Raises: Stopped, Refusal, RatchetError, or whatever a task raised."""
    config: RLConfig = run.config
    client_config = config.orchestrator.client
    if is_own_server:
        # The launcher notices when it dies; how long a large model loads is nobody's error.
        client_config = client_config.model_copy(update={"wait_s": math.inf})
    guard = Guard(run, "orchestrator")
    guard.add(files.of_program(samples=True) | files.of_model(config.model))
    code.watch().see = guard.see_module
    chat = Chat.load(config.model.tokenizer or config.model.name)
    envs = registry.build_all(config.orchestrator.env, guard)
    guard.check()
    scheduler = build_scheduler(run, envs, guard.inputs.digest)
    target, routing = Target(places_of(run), is_exact=config.deterministic), routing_rules(config)
    policies = Policies(run, rules_of(config), scheduler, target)
    wake = asyncio.Event()
    heartbeat.follow_loop()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                Client(url, timeout_s=client_config.timeout_s, concurrency=routing.capacity)
            )
            for url in base_urls
        ]
        pool = Pool(clients, client_config, target, routing, on_change=wake.set)
        orchestrator = Orchestrator(run, pool, chat, envs, scheduler, policies, guard, wake)
        work = asyncio.create_task(orchestrator.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            # A batch that is being published is finished by its thread; what is in flight is played again.
            raise Stopped(
                f"stopped before batch {scheduler.next_batch}; the same command continues."
            ) from None
        except BaseExceptionGroup as group:
            raise _first(group) from group


def _first(error: BaseException) -> BaseException:
    """The exception that stopped the others."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
