"""The shapes that cross the wire: OpenAI's completions, and vLLM's token-in, token-out `generate`.

What this engine cannot do is refused by name rather than ignored: an answer that looks right and was sampled
otherwise is worse than none.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ratchet.config import LOWEST_TEMPERATURE, is_temperature
from ratchet.errors import Refusal

Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0)]
TokenIds = list[Annotated[int, Meta(ge=0)]]

# Options of the protocol that do not exist here, with the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "stream_options": (None,),
    "top_p": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None,),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
}
_WITHOUT_EFFECT = ("user", "metadata", "store", "request_id", "priority", "cache_salt")


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to sample: what the three endpoints share."""

    n: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Choices for one prompt. With n > 1 and a seed, choice i has the seed `rng.derive(seed, "n", i)`."""
    temperature: Temperature | None = None
    """1 if absent; 0 takes the most probable token."""
    seed: Seed | None = None
    """The same seed, prompt and weights give the same tokens, whatever else is in flight."""
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False


class SamplingParams(Options):
    """Of `/inference/v1/generate`."""

    max_tokens: Count | None = None
    logprobs: int | None = None
    """0 asks for those of the sampled tokens; no others are computed."""


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`/inference/v1/generate`: tokens in, tokens out."""

    token_ids: TokenIds
    sampling_params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    model: str | None = None


class CompletionRequest(Options):
    """`/v1/completions`."""

    prompt: str | list[Any]
    """A text, token ids, or a list of either (see `prompts_of`)."""
    model: str | None = None
    max_tokens: Count | None = None
    logprobs: int | None = None
    """0 asks for those of the sampled tokens; no others are computed."""
    stop: str | list[str] | None = None
    return_token_ids: bool = False


class ChatRequest(Options):
    """`/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    stop: str | list[str] | None = None
    return_token_ids: bool = False


R = TypeVar("R", GenerateRequest, CompletionRequest, ChatRequest)


def parse(cls: type[R], body: bytes) -> R:
    """One request. Raises: Refusal that names the field."""
    fields = decode(body)
    parameters = fields.get("sampling_params")
    if isinstance(parameters, dict):
        fields["sampling_params"] = _drop_unused(parameters)
    try:
        request = msgspec.convert(_drop_unused(fields), cls)
    except msgspec.ValidationError as error:
        raise Refusal(f"{error}.") from None
    options = request.sampling_params if isinstance(request, GenerateRequest) else request
    _check(options)
    return request


def sampling_params(**given: Any) -> SamplingParams:
    """How to sample, from elsewhere than a body, and checked like one. Raises: Refusal."""
    try:
        options = msgspec.convert(given, SamplingParams)
    except msgspec.ValidationError as error:
        raise Refusal(f"{error}.") from None
    _check(options)
    return options


def _check(options: Options) -> None:
    temperature = options.temperature
    if temperature is not None and not is_temperature(temperature):
        raise Refusal(f"temperature must be 0 or at least {LOWEST_TEMPERATURE:g}; {temperature:g} was given.")
    if isinstance(options, SamplingParams | CompletionRequest) and options.logprobs not in (None, 0):
        raise Refusal(
            f"logprobs = {options.logprobs} is not supported by this engine: 0 gives those of the sampled tokens."
        )


def decode(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises: Refusal."""
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refusal(f"The body is not a JSON object: {error}.") from None


def _drop_unused(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name, neutral in _UNUSED.items():
        if name in fields and fields[name] not in neutral:
            why = " (it would falsify the logprobs)" if name in ("top_p", "top_k", "min_p") else ""
            raise Refusal(f"{name} = {fields[name]!r} is not supported by this engine{why}: leave it out.")
    return {k: v for k, v in fields.items() if k not in _UNUSED and k not in _WITHOUT_EFFECT}


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion: a text, tokens, or a list of either. Raises: Refusal."""
    many = prompt if isinstance(prompt, list) and not _is_tokens(prompt) else [prompt]
    if not many or not all(isinstance(one, str) or _is_tokens(one) for one in many):
        raise Refusal("prompt must be a text, a list of token ids, or a list of either.")
    return many


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def text_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their text parts joined. Raises: Refusal for a message that is not text."""
    return [{**message, "content": _text(message)} for message in messages]


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if (
        not isinstance(message.get("role"), str)
        or len(texts) < len(parts)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise Refusal("Each message needs a role and a content of text.")
    return "".join(text for text in texts if isinstance(text, str))


def error_body(message: str, kind: str, code: str) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": code}})
