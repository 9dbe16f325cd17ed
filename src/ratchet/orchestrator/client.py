"""The client of one vLLM-shaped inference server: tokens in, tokens out, and live weights.

Every call is one try. What yields nothing by no fault of its own is `Torn`, and played again by the pool with the
same seed; what the server understood and refuses is `Answered`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec

from ratchet import lane
from ratchet.errors import RatchetError, Refusal
from ratchet.orchestrator.calls import Answered, Completion, PauseMode, Request, Span, Torn, refusal
from ratchet.orchestrator.lane import Lane, NotSpoken
from ratchet.weights import Policy

T = TypeVar("T")

CONFLICT = 409
DAMAGED = 400
UNSEEN = 410
UPDATE = "/update_weights"
_GENERATE = "/inference/v1/generate"
_SPARE_CONNECTIONS = 8
_LONGEST_SENTENCE = 500
_FIRST_BYTES = 80


class WeightInfo(msgspec.Struct, frozen=True):
    """What a server says about the weights it holds; a plain vLLM says the version only."""

    weight_version: str = ""
    paused: bool | None = None
    architecture: str | None = None
    architecture_facts: dict[str, Any] = {}
    slots: int | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    batch_invariant: bool | None = None
    lane: int | None = None
    """The version of the lane that it has."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a token's bits depend on besides weights, prompt and seed."""
        names = ("slots", "dtype", "device", "threads", "batch_invariant")
        return {name: getattr(self, name) for name in names}


class _Logprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Logprob]


class _Choice(msgspec.Struct):
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[Span] | None = None


class _Generated(msgspec.Struct):
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """What /v1/models says: the names that a server serves."""

    data: list[_Model]


class _IsPaused(msgspec.Struct):
    is_paused: bool


class Client:
    """One server. Use `async with`, and `connect` before anything is generated."""

    def __init__(self, base_url: str, *, timeout_s: float, concurrency: int) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._open: set[asyncio.Task[Any]] = set()
        self._has_lane = False
        self._lane: Lane | None = None
        self._model = ""
        self.max_model_len: int | None = None

    async def __aenter__(self) -> "Client":
        limit = self._concurrency + _SPARE_CONNECTIONS
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limit, limit_per_host=0),
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._lane is not None:
            await self._lane.close()
        if self._session is not None:
            await self._session.close()

    async def check_health(self, timeout_s: float) -> None:
        """Raises: Torn, or Answered, where there is no sign of life. Not cut by `cut`."""
        await self._request("GET", "/health", None, timeout_s)

    async def connect(self) -> None:
        """Learn the name that the server serves. Raises: Torn, RatchetError."""
        served = await self._get("/v1/models", Models)
        if not served.data:
            raise RatchetError(f"inference at {self.base_url} serves no model.")
        self._model, self.max_model_len = served.data[0].id, served.data[0].max_model_len

    async def generate(self, request: Request) -> Completion:
        """Sample one answer. Raises: Torn, RatchetError."""
        if self._has_lane:
            try:
                return self._checked(await self._ask(request))
            except NotSpoken:
                self._has_lane = False
        return self._checked(await self._post(request))

    async def _ask(self, request: Request) -> Completion:
        """By the lane; a new one where there is none, or it is torn. Raises: Torn, NotSpoken, RatchetError."""
        if self._lane is None or self._lane.is_torn:
            assert self._session is not None, "use the client inside `async with`"
            self._lane = Lane(self._session, self.base_url, timeout_s=self._timeout_s)
        said = await self._lane.ask(request)
        if isinstance(said, lane.Failure):
            raise refusal(lane.PATH, said.status, said.sentence)
        spans = [Span(*version) for version in said.versions]
        return Completion(said.token_ids, said.logprobs, spans, said.finish_reason)

    async def _post(self, request: Request) -> Completion:
        """By a request of its own, as any vLLM-shaped server understands it. Raises: Torn, RatchetError."""
        sampling = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "logprobs": 0,
            "stop_token_ids": request.stop_token_ids,
        }
        body = {"model": self._model, "token_ids": request.token_ids, "sampling_params": sampling}
        data = await self._exchange("POST", _GENERATE, msgspec.json.encode(body))
        generated = self._decode(_GENERATE, data, _Generated)
        if not generated.choices:
            raise Torn("answer", "the answer has no choice")
        choice = generated.choices[0]
        logprobs = [item.logprob for item in choice.logprobs.content] if choice.logprobs else []
        return Completion(
            choice.token_ids, logprobs, choice.weight_versions or [], choice.finish_reason or "nothing"
        )

    def _checked(self, answer: Completion) -> Completion:
        """Raises: Torn if it was not sampled to its end; RatchetError if it does not say what each token needs."""
        if answer.finish_reason not in ("stop", "length"):
            raise Torn("answer", f"the answer ended as {answer.finish_reason!r}")
        count = len(answer.token_ids)
        if len(answer.logprobs) != count or not _covers(answer.versions, count):
            raise RatchetError(
                f"inference at {self.base_url} answered {count} tokens with {len(answer.logprobs)} logprobs and weight "
                f"versions {answer.versions}: each token needs both; use Ratchet's own server or vLLM >= 0.32."
            )
        return answer

    async def weight_info(self) -> WeightInfo:
        """The weights that the server holds now, and whether it is paused.

        Raises: Torn; Refusal for a server whose weights cannot be asked for; RatchetError
        """
        try:
            info = await self._get("/weight_info", WeightInfo)
        except Answered as error:
            raise Refusal(
                foreign(self.base_url, error.path, f"status {error.status}: {error.sentence}")
            ) from None
        if info.paused is None:
            paused = await self._get("/is_paused", _IsPaused)
            info = msgspec.structs.replace(info, paused=paused.is_paused)
        self._has_lane = info.lane == lane.VERSION
        return info

    async def adopt(self, policy: Policy, directories: Sequence[Path], mode: PauseMode) -> None:
        """Give the server a policy, from the first of these directories that it sees, and check that it has it.

        A server that knows `path` alone takes the last one, which is on the disk if the policy is.
        Raises: Torn if any part of the cycle is, it is to be repeated as a whole; Answered.
        """
        version, paths = str(policy), [str(directory.absolute()) for directory in directories]
        await self._exchange("POST", f"/pause?mode={mode}")
        await self._exchange("POST", "/start_weight_update")
        update = {"update_info": {"path": paths[-1], "paths": paths, "digest": policy.digest}}
        await self._exchange("POST", UPDATE, msgspec.json.encode(update))
        name = {"weight_version": version}
        await self._exchange("POST", "/finish_weight_update", msgspec.json.encode(name))
        await self._exchange("POST", "/reset_prefix_cache")
        await self._exchange("POST", "/resume")
        info = await self.weight_info()
        if info.weight_version != version or info.paused:
            raise Torn("answer", f"it then reported version {info.weight_version!r}, paused: {info.paused}")

    def cut(self) -> None:
        """Tear every call that waits for an answer, as if its connection had broken."""
        for task in self._open:
            task.cancel()
        if self._lane is not None:
            self._lane.tear(self._silent)

    def _silent(self) -> Torn:
        return Torn("silent", f"{self.base_url} gave no sign of life")

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One request, unless it is cut. Raises: Torn, or Answered for a refusal that is the server's own."""
        task = asyncio.create_task(self._request(method, path, body, self._timeout_s))
        self._open.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise self._silent() from None
        finally:
            self._open.discard(task)

    async def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        assert self._session is not None, "use the client inside `async with`"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.base_url + path, data=body, timeout=timeout
            ) as response:
                data, status = await response.read(), response.status
        except TimeoutError:
            raise Torn("timeout", f"no answer within {timeout_s:g} s") from None
        except aiohttp.ClientResponseError as error:
            raise Torn(
                "answer", f"it answers, but not in HTTP: {error.message[:_LONGEST_SENTENCE]}"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Torn("connection", f"{type(error).__name__} {error}".strip()) from None
        if status >= 400:
            raise refusal(path, status, _sentence(data))
        return data

    async def _get(self, path: str, answer: type[T]) -> T:
        return self._decode(path, await self._exchange("GET", path), answer)

    def _decode(self, path: str, data: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=answer)
        except msgspec.DecodeError as error:
            raise RatchetError(
                f"inference at {self.base_url} answered {path} with something else: {error}."
            ) from None


def nobody_answers(urls: Sequence[str], waited_s: float, others: Mapping[str, str]) -> str:
    """The sentence for servers that are not there; `others` are the URLs where something else answers, and how."""
    silent = ", ".join(url for url in urls if url not in others)
    found = [f"nobody answers at {silent} after {waited_s:g} s"] if silent else []
    found += [
        f"{url}/health answers with {said}, which no inference server does" for url, said in others.items()
    ]
    return f"{'; '.join(found)}: start `uv run inference @ ...` or set orchestrator.client.base_url."


def foreign(url: str, path: str, said: str) -> str:
    """The sentence for a server that is there, and is none that a run can use."""
    return (
        f"The server at {url} answers {path} with {said}: it is neither Ratchet's own server nor a vLLM with its "
        "middleware (docs/scaling.md); set orchestrator.client.base_url."
    )


def said_by(status: int, server: str | None, body: bytes) -> str:
    """An answer in so few words that a person recognises whose it is."""
    named = f" from {server[:_FIRST_BYTES]}" if server else ""
    begins = " ".join(body[:_FIRST_BYTES].decode(errors="replace").split())
    return f"status {status}{named}" + (f", beginning {begins!r}" if begins else "")


def _covers(spans: Sequence[Span], count: int) -> bool:
    """Whether the spans name a version for each of `count` tokens, once."""
    end = 0
    for span in spans:
        if span.start != end or span.end < span.start:
            return False
        end = span.end
    return end == count


def _sentence(data: bytes) -> str:
    """What an error body says, whichever of the usual shapes it has."""
    try:
        body = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return data[:_LONGEST_SENTENCE].decode(errors="replace")
    found = body
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:_LONGEST_SENTENCE]
