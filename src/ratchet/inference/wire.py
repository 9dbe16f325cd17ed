"""The shapes that cross the wire: OpenAI's completions, and vLLM's token-in, token-out `generate`.

What this engine cannot do is refused by name rather than ignored: an answer that looks right and was sampled
otherwise is worse than none.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ratchet.config import LOWEST_TEMPERATURE, is_temperature
from ratchet.errors import Refusal

Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0)]
TokenIds = list[Annotated[int, Meta(ge=0)]]

# Options of the protocol that do not exist here, with the values that mean "not used". docs/scaling.md lists them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
# What changes no token, whatever it is.
IGNORED = {
    "user", "metadata", "store", "request_id", "priority", "cache_salt", "safety_identifier", "service_tier",
    "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "prediction",
}  # fmt: skip
_FALSIFYING = ("top_p", "top_k", "min_p")


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


class StreamOptions(msgspec.Struct):
    """What a stream says besides its choices."""

    include_usage: bool = False


class Streamed(Options, kw_only=True):
    """Of OpenAI's two: the answer may be asked for as a stream of events."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    """Without `stream` it changes nothing."""


class CompletionRequest(Streamed):
    """`/v1/completions`."""

    prompt: str | list[Any]
    """A text, token ids, or a list of either (see `prompts_of`)."""
    model: str | None = None
    max_tokens: Count | None = None
    logprobs: int | None = None
    """0 asks for those of the sampled tokens; no others are computed."""
    stop: str | list[str] | None = None
    return_token_ids: bool = False


class ChatRequest(Streamed):
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
        fields["sampling_params"] = _drop_unused(SamplingParams, parameters)
    try:
        request = msgspec.convert(_drop_unused(cls, fields), cls)
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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"The body is not a JSON object: {error}.") from None


def _drop_unused(cls: type[msgspec.Struct], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, which is as good as left out, neutral, or has no effect. Raises: Refusal"""
    kept = {}
    for name, value in fields.items():
        if name in cls.__struct_fields__:
            kept[name] = value
        elif name in NEUTRAL and value not in NEUTRAL[name] and value is not None:
            why = " (it would falsify the logprobs)" if name in _FALSIFYING else ""
            raise Refusal(f"{name} = {value!r} is not supported by this engine{why}: leave it out.")
        elif name not in NEUTRAL and name not in IGNORED:
            kept[name] = value
    return {name: value for name, value in kept.items() if value is not None}


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
    return [{**message, "content": _text(f"messages[{i}]", message)} for i, message in enumerate(messages)]


def _text(name: str, message: dict[str, Any]) -> str:
    if not isinstance(message.get("role"), str):
        raise Refusal(f"{name} has no role: each message needs a role and a content of text.")
    content = message.get("content")
    if content is None:
        calls = ", and tool calls are not read" if message.get("tool_calls") else ""
        raise Refusal(
            f"{name} has no content{calls}: each message needs a text here, or a list of text parts."
        )
    return "".join(_texts(name, content)) if isinstance(content, list) else _checked_text(name, content)


def _texts(name: str, parts: list[Any]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise Refusal(f"{name} has a part of type {kind!r}: only parts of type 'text' are read.")
        yield _checked_text(name, part.get("text"))


def _checked_text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise Refusal(f"{name} has a content that is no text: each message needs a text, or text parts.")
    return text


def error_body(message: str, kind: str, code: str) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": code}})
