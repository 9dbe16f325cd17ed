"""Middleware for vLLM's API server: the routes of live weights, in the shape of the embedded engine.

    vllm serve ... --middleware ratchet.inference.vllm.front.Front

vLLM has most of these routes in its development mode, with three differences that matter: a client that dies inside
an update leaves a server that refuses the next one, a refusal is a status 500 like any crash, and the same mode lets
anyone run code. Here the sequence may always be begun again, a refusal says what is wrong, and nothing else is open.

Who waits for whom: a pause with mode `wait` waits for the engine to drain or for a resume; an update waits for the
one before it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import AutoConfig
from vllm import __version__ as vllm_version  # pyright: ignore
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest  # pyright: ignore

from ratchet import heartbeat, weights
from ratchet.errors import Damaged, RatchetError, Refusal
from ratchet.inference.adoption import UNLABELLED, OutOfSequence, Unseen, UpdateSequence, Wanted, architecture
from ratchet.inference.vllm.plugin import BACKEND
from ratchet.inference.vllm.transfer import carried

MODES = ("keep", "wait", "abort")
_KINDS: dict[str, type[Refusal]] = {kind.__name__: kind for kind in (Damaged, OutOfSequence, Refusal, Unseen)}


class Interrupted(RatchetError):
    """What was waited for will not happen: the server was resumed."""


_STATUS: dict[type[RatchetError], int] = {OutOfSequence: 409, Interrupted: 409, Unseen: 410}


class Front:
    """The middleware: one for each server, with what it knows about updates and pauses."""

    on_ready: Callable[["Front"], None] = staticmethod(lambda front: None)
    """Called when the application is up; a server of ours says so to its launcher."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._updates = UpdateSequence()
        self._lock = asyncio.Lock()
        self._draining: asyncio.Task[Any] | None = None
        self._is_loading = False
        self._frozen: frozenset[str] = frozenset()
        self._engine: Any = None
        self._arguments: Any = None
        self._identity: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._announcing(scope, send))
            return
        handler = _ROUTES.get((scope.get("method", ""), scope.get("path", "")))
        if handler is None:
            await self._app(scope, receive, send)
            return
        self._meet(scope)
        response = await self._answer(handler, Request(scope, receive))
        await response(scope, receive, send)

    def _meet(self, scope: Scope) -> None:
        state = scope["app"].state
        self._engine, self._arguments = state.engine_client, state.args

    def _announcing(self, scope: Scope, send: Send) -> Send:
        async def announce(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._meet(scope)
                self.on_ready(self)

        return announce

    async def answers(self) -> None:
        """Wait for a word of the engine, which is a process of its own; while it loads weights it owes none."""
        if self._is_loading:
            return
        asked = asyncio.ensure_future(self._engine.is_paused())
        while not asked.done() and not self._is_loading:
            await asyncio.wait({asked}, timeout=heartbeat.PERIOD_S)

    async def _answer(self, handler: "Handler", request: Request) -> Response:
        try:
            return JSONResponse(await handler(self, request))
        except RatchetError as error:
            status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)
            body = {"message": str(error), "type": type(error).__name__, "code": str(status)}
            return JSONResponse({"error": body}, status)

    async def weight_info(self, request: Request) -> dict[str, Any]:
        if not self._identity:
            self._identity = self._describe()
        unfinished = set(self._engine.output_processor.request_states)
        slots = self._identity["slots"]
        is_draining = self._draining is not None
        is_paused = await self._engine.is_paused() and not is_draining
        active = min(len(unfinished & self._frozen if is_paused or is_draining else unfinished), slots)
        return {
            "weight_version": await self._engine.get_weight_version(),
            "paused": is_paused,
            "draining": is_draining,
            "active": active,
            "waiting": len(unfinished) - active,
            **self._identity,
        }

    def _describe(self) -> dict[str, Any]:
        """What a client must know about this server to trust its answers."""
        settings = self._engine.vllm_config
        model, transfer = settings.model_config, settings.weight_transfer_config
        config = AutoConfig.from_pretrained(model.model)
        return {
            "engine": f"vllm {vllm_version}",
            "architecture": architecture(config),
            "architecture_facts": weights.facts(config.to_dict()),
            "slots": settings.scheduler_config.max_num_seqs,
            "max_model_len": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": settings.device_config.device_type,
            "weight_transfer": transfer.backend if transfer is not None else None,
            "logprobs_mode": model.logprobs_mode,
            "sampling_defaults": model.get_diff_sampling_param(),
            "scale_out": self._arguments.enable_scale_out,
        }

    async def init_weight_transfer_engine(self, request: Request) -> dict[str, Any]:
        return {"message": "Weights are read from published directories: nothing to set up."}

    async def pause(self, request: Request) -> dict[str, Any]:
        mode = request.query_params.get("mode", "abort")
        if mode not in MODES:
            raise Refusal(f"mode must be one of {', '.join(MODES)}; {mode!r} was given.")
        async with self._lock:
            if self._updates.is_unlabelled and mode == "wait":
                # An update was left between loading and naming: draining would sample tokens without a version.
                mode = "keep"
            self._frozen = frozenset(self._engine.output_processor.request_states)
            pausing = asyncio.ensure_future(self._engine.pause_generation(mode=mode))
            if mode == "wait":
                self._draining = pausing
        try:
            await asyncio.shield(pausing)
            if mode == "wait":
                self._frozen = frozenset()  # what is unfinished now had not begun: vLLM drains what it runs
        except asyncio.CancelledError:
            if pausing.cancelled():
                raise Interrupted("The server was resumed before it had drained.") from None
            raise
        finally:
            if self._draining is pausing:
                self._draining = None
        return {"status": "paused"}

    async def resume(self, request: Request) -> dict[str, Any]:
        async with self._lock:
            self._updates.resume()
            if self._draining is not None:
                self._draining.cancel()
            await self._engine.resume_generation()
        return {"status": "resumed"}

    async def start_weight_update(self, request: Request) -> dict[str, Any]:
        self._updates.start(is_paused=await self._is_paused())
        return {"message": "Weight update started."}

    async def update_weights(self, request: Request) -> dict[str, Any]:
        wanted = Wanted.parse(await _body(request))
        async with self._lock:
            self._updates.check_update(is_paused=await self._is_paused())
            if self._engine.vllm_config.weight_transfer_config is None:
                raise Refusal(f'Start vLLM with --weight-transfer-config \'{{"backend": "{BACKEND}"}}\'.')
            await self._load(wanted)
            await self._engine.update_weight_version(UNLABELLED)
            self._updates.loaded()
        return {"message": f"Loaded one of {', '.join(wanted.paths)}."}

    async def _load(self, wanted: Wanted) -> None:
        """One whole update in vLLM's terms, so that none is ever left open there."""
        await self._engine.start_weight_update()
        self._is_loading = True
        try:
            paths = list(wanted.paths) if wanted.is_choice else []
            info = {"path": wanted.paths[-1], "paths": paths, "digest": wanted.digest or ""}
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=info))
        except Exception as error:
            if (refusal := carried(str(error))) is None:
                raise
            raise _KINDS.get(refusal[0], Refusal)(refusal[1]) from None
        finally:
            self._is_loading = False
        await self._engine.finish_weight_update()

    async def finish_weight_update(self, request: Request) -> dict[str, Any]:
        version = (await _body(request)).get("weight_version")
        if not isinstance(version, str) or not version or version == UNLABELLED:
            raise Refusal("weight_version must be a text that names the weights.")
        async with self._lock:
            self._updates.finish()
            await self._engine.update_weight_version(version)
        return {"message": f"The weights are {version} now."}

    async def reset_prefix_cache(self, request: Request) -> dict[str, Any]:
        """Forget every prompt; sequences in flight are computed again, or vLLM would keep all of it."""
        wanted = request.query_params.get("reset_running_requests", "false").lower() == "true"
        is_reset = await self._engine.reset_prefix_cache(wanted)
        if not is_reset and not wanted:
            is_reset = await self._engine.reset_prefix_cache(True)
        return {"success": is_reset}

    async def _is_paused(self) -> bool:
        return self._draining is None and await self._engine.is_paused()


Handler = Callable[[Front, Request], Awaitable[dict[str, Any]]]
_ROUTES: Mapping[tuple[str, str], Handler] = {
    ("GET", "/weight_info"): Front.weight_info,
    ("POST", "/init_weight_transfer_engine"): Front.init_weight_transfer_engine,
    ("POST", "/pause"): Front.pause,
    ("POST", "/start_weight_update"): Front.start_weight_update,
    ("POST", "/update_weights"): Front.update_weights,
    ("POST", "/finish_weight_update"): Front.finish_weight_update,
    ("POST", "/reset_prefix_cache"): Front.reset_prefix_cache,
    ("POST", "/resume"): Front.resume,
}


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object; an empty body is an empty one. Raises: Refusal."""
    try:
        body = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refusal(f"The body is not a JSON object: {error}.") from None
    if not isinstance(body, dict):
        raise Refusal("The body is not a JSON object.")
    return body
