"""A server from start to stop: build the model, prove the engine, serve until a signal."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator

import torch
import uvicorn

from ratchet import address, heartbeat, weights
from ratchet.chat import Chat
from ratchet.config import InferenceConfig, RLConfig
from ratchet.errors import RatchetError, Refusal
from ratchet.inference import adoption, checks
from ratchet.inference.engine import Engine
from ratchet.inference.server import application
from ratchet.inference.service import Service
from ratchet.inference.slots import SlotModel
from ratchet.inference.worker import Worker
from ratchet.log import LOGGER
from ratchet.models.build import build

CLOSE_TIMEOUT_S = 2
_BACKLOG = 2048
_KEEP_ALIVE_S = 600
_FRAME_BYTES = 1 << 30


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would raise the signal again, and so end with another exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve_on(
    config: RLConfig,
    listener: socket.socket,
    say: Callable[[str], object],
    device: torch.device,
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are then answered 503, for their client to play again.

    Raises: Refusal if the model cannot be served; whatever the engine's thread died of.
    """
    assert config.inference is not None
    make_repeatable(config.inference.threads)
    engine, facts = load_engine(config, config.inference, device)
    asyncio.run(_serve(config, engine, facts, listener, say))


def make_repeatable(threads: int) -> None:
    """Fix what decides bits besides the inputs: the number of threads and the choice of kernels."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def load_engine(
    config: RLConfig, settings: InferenceConfig, device: torch.device
) -> tuple[Engine, dict[str, object]]:
    """The engine, checked, and the facts that `/weight_info` reports about it. Raises: Refusal."""
    chat = Chat.load(config.model.tokenizer or config.model.name)
    # The engine brings its own attention: that of training need not be installed here.
    source = config.model.model_copy(update={"attention": "eager"})
    model = build(source, seed=config.seed, device=device.type, dtype=getattr(torch, settings.dtype))
    slot_model = SlotModel(model, settings.slots, checks.check_positions(model, settings.max_model_len))
    checks.check_model(slot_model)
    is_invariant = checks.is_batch_invariant(slot_model)
    if not is_invariant:
        _say_variant(config, settings)
    facts: dict[str, object] = {
        "slots": settings.slots,
        "max_model_len": slot_model.max_model_len,
        "dtype": settings.dtype,
        "device": device.type,
        "threads": settings.threads,
        "batch_invariant": is_invariant,
        "architecture_facts": weights.facts(model.config.to_dict()),
    }
    return Engine(slot_model, chat.decode), facts


def _say_variant(config: RLConfig, settings: InferenceConfig) -> None:
    what = f"On this machine a sequence's bits depend on its slot ({settings.slots} slots, {settings.dtype})"
    if config.deterministic:
        raise Refusal(f"{what}: choose a multiple of 16 for inference.slots, or set deterministic = false.")
    LOGGER.warning("%s: equal seeds may give different tokens.", what)


async def _serve(
    config: RLConfig,
    engine: Engine,
    facts: dict[str, object],
    listener: socket.socket,
    say: Callable[[str], object],
) -> None:
    loop = asyncio.get_running_loop()
    crashes: list[BaseException] = []

    def on_crash(error: BaseException) -> None:
        crashes.append(error)
        loop.call_soon_threadsafe(stop)

    worker = Worker(engine, torch.get_num_threads(), on_crash, loop.call_soon_threadsafe)
    service = Service(
        name=config.model.name,
        chat=Chat.load(config.model.tokenizer or config.model.name),
        worker=worker,
        architecture=adoption.architecture(engine.model.model.config),
        facts=facts,
    )
    server = _Server(
        uvicorn.Config(
            application(service),
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            ws_per_message_deflate=False,
            ws_ping_interval=None,  # whether the other side lives is the orchestrator's question, by /health
            ws_max_size=_FRAME_BYTES,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
    )

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        service.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    worker.start()
    heartbeat.follow_loop()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        say(f"serving {config.model.name} at {address.url(listener)}")
    await serving
    if crashes:
        raise RatchetError(f"The engine died: {crashes[0]!r}") from crashes[0]
    worker.stop()
