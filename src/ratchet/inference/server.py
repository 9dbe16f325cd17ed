"""The HTTP server: vLLM's wire protocol in front of the embedded engine.

client ── HTTP ──► event loop ── queue ──► worker thread (the engine)
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ratchet.errors import RatchetError, Refusal
from ratchet.inference import completions, lane, updates, wire
from ratchet.inference.adoption import OutOfSequence, Unseen
from ratchet.inference.service import (
    STOPPING,
    Broken,
    ClientGone,
    NotServed,
    Service,
    TooLarge,
    Unavailable,
    as_json,
)
from ratchet.inference.worker import Interrupted
from ratchet.lane import PATH as LANE

_LONGEST_SENTENCE = 1000
Handler = Callable[[Service, Request], Awaitable[Response]]

_STATUS: list[tuple[type[RatchetError], int, str]] = [
    (NotServed, 404, "not_found"),
    (TooLarge, 413, "invalid_request_error"),
    (Unseen, 410, "gone"),
    (OutOfSequence, 409, "conflict"),
    (Interrupted, 409, "conflict"),
    (Refusal, 400, "invalid_request_error"),
    (Unavailable, 503, "unavailable"),
    (Broken, 500, "internal_error"),
]


async def health(service: Service, request: Request) -> Response:
    return Response()


async def models(service: Service, request: Request) -> Response:
    return as_json({"object": "list", "data": [_card(service)]})


async def model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return as_json(_card(service))


def _card(service: Service) -> dict[str, Any]:
    card = {"id": service.name, "object": "model", "created": service.started_at, "owned_by": "ratchet"}
    return {**card, "max_model_len": service.max_model_len}


def _error(status: int, message: str, kind: str, code: str) -> Response:
    if len(message) > _LONGEST_SENTENCE:  # it repeats what was given
        message = f"{message[:_LONGEST_SENTENCE]}..."
    return Response(wire.error_body(message, kind, code), status_code=status, media_type="application/json")


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/health", health),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/v1/chat/completions", completions.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/inference/v1/generate", completions.generate),
    ("GET", "/weight_info", updates.weight_info),
    ("POST", "/init_weight_transfer_engine", updates.init_weight_transfer_engine),
    ("POST", "/pause", updates.pause),
    ("POST", "/start_weight_update", updates.start_weight_update),
    ("POST", "/update_weights", updates.update_weights),
    ("POST", "/finish_weight_update", updates.finish_weight_update),
    ("POST", "/reset_prefix_cache", updates.reset_prefix_cache),
    ("POST", "/resume", updates.resume),
]


def application(service: Service) -> Starlette:
    """The ASGI application: the routes, with every refusal as a JSON error."""

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            try:
                return await handler(service, request)
            except ClientGone:
                return Response(status_code=499)
            except asyncio.CancelledError:
                if not service.stopping.is_set():
                    raise
                return _error(503, STOPPING, "Unavailable", "unavailable")  # it waited for the rest of a body
            except RatchetError as error:
                for kind, status, code in _STATUS:
                    if isinstance(error, kind):
                        return _error(status, str(error), type(error).__name__, code)
                raise

        return call

    def on_http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return _error(
            status, f"{request.method} {request.scope['path']}: {error}", "HTTPException", str(status)
        )

    async def serve_lane(socket: WebSocket) -> None:
        await lane.Lane(service, socket).run()

    routes = [
        *(Route(path, endpoint(handler), methods=[method]) for method, path, handler in ROUTES),
        WebSocketRoute(LANE, serve_lane),
    ]
    handlers = {HTTPException: on_http_error, Exception: on_http_error}
    return Starlette(routes=routes, exception_handlers=handlers)
