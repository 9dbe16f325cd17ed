"""The routes of live weights, vLLM's sequence: pause, start, update, finish, reset the prefix cache, resume."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from ratchet.errors import Refusal
from ratchet.inference import adoption, wire
from ratchet.inference.adoption import UNLABELLED, Wanted
from ratchet.inference.service import Service, as_json
from ratchet.inference.worker import Mode
from ratchet.log import LOGGER

MODES: dict[str, Mode] = {"keep": "keep", "wait": "wait", "abort": "abort"}


async def weight_info(service: Service, request: Request) -> Response:
    return as_json(service.info())


async def init_weight_transfer_engine(service: Service, request: Request) -> Response:
    return as_json({"message": "Weights are read from published directories: nothing to set up."})


async def pause(service: Service, request: Request) -> Response:
    given = request.query_params.get("mode", "abort")
    mode = MODES.get(given)
    if mode is None:
        raise Refusal(f"mode must be one of {', '.join(MODES)}; {given!r} was given.")
    async with service.update_lock:
        if service.updates.is_unlabelled and mode == "wait":
            # An update was left between loading and naming: draining would sample tokens without a version.
            mode = "keep"
        paused = service.worker.pause(mode)
    await asyncio.wrap_future(paused)
    return as_json({"status": "paused"})


async def resume(service: Service, request: Request) -> Response:
    async with service.update_lock:
        service.updates.resume()
        resumed = service.worker.resume()
    await asyncio.wrap_future(resumed)
    return as_json({"status": "resumed"})


async def start_weight_update(service: Service, request: Request) -> Response:
    service.updates.start(is_paused=service.worker.is_paused)
    return as_json({"message": "Weight update started."})


async def update_weights(service: Service, request: Request) -> Response:
    wanted = Wanted.parse(wire.decode(await service.body(request)))
    async with service.update_lock:
        service.updates.check_update(is_paused=service.worker.is_paused)
        worker = service.worker
        directory, tensors = await asyncio.to_thread(wanted.read, service.architecture)
        copy = await asyncio.to_thread(adoption.copier, worker.engine.model.model, tensors)

        def adopt() -> None:
            service.updates.check_update(is_paused=worker.is_paused)
            worker.engine.adopt(copy, UNLABELLED)
            service.updates.loaded()

        await asyncio.wrap_future(worker.call(adopt))
    return as_json({"message": f"Loaded {directory}."})


async def finish_weight_update(service: Service, request: Request) -> Response:
    version = wire.decode(await service.body(request)).get("weight_version")
    if not isinstance(version, str) or not version or version == UNLABELLED:
        raise Refusal("weight_version must be a text that names the weights.")
    async with service.update_lock:
        service.updates.finish()
        service.worker.engine.version = version
    LOGGER.info("serving weights %s", version)
    return as_json({"message": f"The weights are {version} now."})


async def reset_prefix_cache(service: Service, request: Request) -> Response:
    engine = service.worker.engine
    await asyncio.wrap_future(service.worker.call(engine.forget_prompts))
    if request.query_params.get("reset_running_requests", "false").lower() == "true":
        await asyncio.wrap_future(service.worker.call(engine.recompute))
    return Response()
