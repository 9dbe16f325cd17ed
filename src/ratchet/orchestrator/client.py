"""The client of a vLLM-shaped inference server: tokens in, tokens out, and live weights.

A request that is torn (connection, timeout, 5xx, abort) is played again with the same seed; how often is
counted in `retries` and never changes a result.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec

from ratchet.config import ClientConfig
from ratchet.errors import RatchetError, Refusal

PauseMode = Literal["keep", "wait"]
T = TypeVar("T")

CONFLICT = 409
DAMAGED = 400
_UPDATE = "/update_weights"
_HEALTH_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 5.0
_BACKOFF_S = 0.05
_BACKOFF_MAX_S = 2.0
_LONGEST_SENTENCE = 500


class Span(msgspec.Struct, frozen=True):
    """Tokens [start, end) of a completion were sampled under weights of this name."""

    version: str
    start: int
    end: int


class Completion(msgspec.Struct, frozen=True):
    """One sampled answer; `logprobs` are those of the sampling distribution."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[Span]
    finish_reason: str


class WeightInfo(msgspec.Struct, frozen=True):
    """What a server says about the weights it holds; a plain vLLM says the version only."""

    weight_version: str = ""
    paused: bool | None = None
    architecture: str | None = None
    architecture_facts: dict[str, Any] = {}


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


class _Models(msgspec.Struct):
    data: list[_Model]


class _IsPaused(msgspec.Struct):
    is_paused: bool


class Torn(Exception):
    """A request yielded nothing, by no fault of its own: it may be repeated."""


class Answered(RatchetError):
    """The server understood a request and says no; repeating it would change nothing."""

    def __init__(self, path: str, status: int, sentence: str) -> None:
        super().__init__(f"inference answered {path} with {status}: {sentence}")
        self.path = path
        self.status = status
        self.sentence = sentence


class Client:
    """One server. Use `async with`, then `connect` once."""

    def __init__(self, base_url: str, config: ClientConfig, *, concurrency: int) -> None:
        self.base_url = base_url.rstrip("/")
        self._config = config
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._health_lock = asyncio.Lock()
        self._healthy_at = 0.0
        self._model = ""
        self.max_model_len: int | None = None
        self.retries = 0

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency + 8, limit_per_host=0),
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def connect(self) -> None:
        """Wait for the server and learn the name it serves. Raises: Refusal if nobody answers in time."""
        if not await self._wait_until_healthy():
            raise Refusal(nobody_answers(self.base_url, self._config.wait_s))
        served = await self._persist("/v1/models", lambda: self._get("/v1/models", _Models))
        if not served.data:
            raise RatchetError(f"inference at {self.base_url} serves no model.")
        self._model, self.max_model_len = served.data[0].id, served.data[0].max_model_len

    async def _wait_until_healthy(self) -> bool:
        deadline = time.monotonic() + self._config.wait_s
        while True:
            try:
                await self._exchange("GET", "/health", timeout_s=_HEALTH_TIMEOUT_S)
                return True
            except (Torn, Answered):
                if time.monotonic() > deadline:
                    return False
            await asyncio.sleep(_HEALTH_POLL_S)

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        seed: int,
        max_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> Completion:
        """Sample one answer. Raises: RatchetError after `client.retries` torn requests."""
        sampling = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": stop_token_ids,
        }
        body = msgspec.json.encode(
            {"model": self._model, "token_ids": token_ids, "sampling_params": sampling}
        )
        return await self._persist("/inference/v1/generate", lambda: self._generate(body))

    async def _generate(self, body: bytes) -> Completion:
        path = "/inference/v1/generate"
        generated = self._decode(path, await self._exchange("POST", path, body), _Generated)
        choice = generated.choices[0] if generated.choices else None
        if choice is None or choice.finish_reason not in ("stop", "length"):
            raise Torn(f"the answer ended as {choice.finish_reason if choice else 'nothing'!r}")
        count = len(choice.token_ids)
        logprobs = [item.logprob for item in choice.logprobs.content] if choice.logprobs else []
        spans = choice.weight_versions or []
        if len(logprobs) != count or not _covers(spans, count):
            raise RatchetError(
                f"inference at {self.base_url} answered {count} tokens with {len(logprobs)} logprobs and weight "
                f"versions {spans}: each token needs both; use Ratchet's own server or vLLM >= 0.32."
            )
        return Completion(choice.token_ids, logprobs, spans, choice.finish_reason)

    async def weight_info(self) -> WeightInfo:
        """The weights that the server holds now, and whether it is paused."""
        info = await self._get("/weight_info", WeightInfo)
        if info.paused is None:
            paused = await self._get("/is_paused", _IsPaused)
            info = msgspec.structs.replace(info, paused=paused.is_paused)
        return info

    async def adopt(self, version: str, path: Path, mode: PauseMode) -> None:
        """Give the server the weights in `path` under the name `version`, and check that it has them.

        The whole cycle is repeated if any part of it is torn, or if the server was restarted inside it and
        so lost the thread (409). Weights that it refuses twice are of another architecture.
        Raises: Refusal for those; RatchetError if the adoption does not succeed.
        """
        refused: list[str] = []

        async def cycle() -> None:
            try:
                await self._adopt(version, path, mode)
            except Answered as error:
                if error.status == DAMAGED and error.path == _UPDATE:
                    # Also what a directory answers that is being replaced while the server reads it.
                    raise Torn(str(error)) from None
                if error.status != CONFLICT:
                    raise
                if error.path == _UPDATE:
                    refused.append(error.sentence)
                if len(refused) > 1:
                    raise Refusal(
                        f"inference at {self.base_url} cannot hold {path}: {error.sentence}"
                    ) from None
                raise Torn(str(error)) from None

        await self._persist(f"the adoption of {version}", cycle)

    async def _adopt(self, version: str, path: Path, mode: PauseMode) -> None:
        await self._exchange("POST", f"/pause?mode={mode}")
        await self._exchange("POST", "/start_weight_update")
        update = {"update_info": {"path": str(path.absolute())}}
        await self._exchange("POST", _UPDATE, msgspec.json.encode(update))
        name = {"weight_version": version}
        await self._exchange("POST", "/finish_weight_update", msgspec.json.encode(name))
        await self._exchange("POST", "/reset_prefix_cache")
        await self._exchange("POST", "/resume")
        info = await self.weight_info()
        if info.weight_version != version or info.paused:
            raise Torn(f"it then reported version {info.weight_version!r}, paused: {info.paused}")

    async def _persist(self, what: str, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request while it is torn, the server having answered /health in between."""
        failed = 0
        while True:
            try:
                return await request()
            except Torn as error:
                torn_at = time.monotonic()
                failed += 1
                self.retries += 1
                if failed > self._config.retries:
                    raise RatchetError(
                        f"{what} at {self.base_url} failed {failed} times; the last time: {error}. "
                        "orchestrator.client.retries allows more."
                    ) from None
            await asyncio.sleep(min(_BACKOFF_S * 2 ** (failed - 1), _BACKOFF_MAX_S))
            await self._recover(torn_at)

    async def _recover(self, torn_at: float) -> None:
        """Wait, once for all torn requests, until the server answers /health again."""
        async with self._health_lock:
            if self._healthy_at > torn_at:
                return
            if not await self._wait_until_healthy():
                raise RatchetError(nobody_answers(self.base_url, self._config.wait_s))
            self._healthy_at = time.monotonic()

    async def _get(self, path: str, answer: type[T]) -> T:
        return self._decode(path, await self._exchange("GET", path), answer)

    def _decode(self, path: str, data: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=answer)
        except msgspec.DecodeError as error:
            raise RatchetError(
                f"inference at {self.base_url} answered {path} with something else: {error}."
            ) from None

    async def _exchange(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float | None = None
    ) -> bytes:
        """One request. Raises: Torn, or Answered for a refusal that is the server's own."""
        assert self._session is not None, "use the client inside `async with`"
        timeout = aiohttp.ClientTimeout(total=timeout_s or self._config.timeout_s)
        try:
            async with self._session.request(
                method, self.base_url + path, data=body, timeout=timeout
            ) as response:
                data, status = await response.read(), response.status
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
            raise Torn(f"{type(error).__name__} {error}".strip()) from None
        if status >= 500 or status == 429:
            raise Torn(f"status {status}: {_sentence(data)}")
        if status >= 400:
            raise Answered(path, status, _sentence(data))
        return data


def nobody_answers(url: str, waited_s: float) -> str:
    """The sentence for a server that is not there."""
    return (
        f"nobody answers at {url} after {waited_s:g} s: start `uv run inference @ ...` "
        "or set orchestrator.client.base_url."
    )


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
