"""The routes that sample: vLLM's token-in, token-out `generate`, and OpenAI's two."""

import itertools
import secrets
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ratchet.chat import Chat
from ratchet.errors import Refusal
from ratchet.inference import wire
from ratchet.inference.engine import Sequence
from ratchet.inference.service import Service, as_json

DEFAULT_MAX_TOKENS = 16
"""Of a completion that does not say: OpenAI's and vLLM's number. A chat may fill what is left."""

MOST_CHOICES = 4096
"""Of one request, over all its prompts."""


async def generate(service: Service, request: Request) -> Response:
    asked = wire.parse(wire.GenerateRequest, await service.body(request))
    service.check_model(asked.model)
    options = asked.sampling_params
    sequences = service.sequences(asked.token_ids, options, options.max_tokens or DEFAULT_MAX_TOKENS)
    await service.complete(request, sequences)
    choices = [
        {
            "index": index,
            "token_ids": one.token_ids,
            "finish_reason": one.finish_reason,
            "logprobs": None
            if options.logprobs is None
            else {"content": [{"logprob": logprob} for logprob in one.logprobs]},
            "weight_versions": _versions(one),
        }
        for index, one in enumerate(sequences)
    ]
    return as_json({"request_id": f"generate-{secrets.token_hex(8)}", "choices": choices})


async def completions(service: Service, request: Request) -> Response:
    body = await service.body(request)

    def read() -> tuple[wire.CompletionRequest, list[list[int]], list[list[Sequence]]]:
        asked = wire.parse(wire.CompletionRequest, body)
        service.check_model(asked.model)
        texts = wire.prompts_of(asked.prompt)
        if len(texts) * (asked.n or 1) > MOST_CHOICES:
            raise Refusal(f"{len(texts)} prompts, n = {asked.n or 1}: {MOST_CHOICES} choices are the most.")
        prompts = [service.chat.encode(text) if isinstance(text, str) else text for text in texts]
        max_tokens = asked.max_tokens or DEFAULT_MAX_TOKENS
        return asked, prompts, [service.sequences(one, asked, max_tokens, asked.stop) for one in prompts]

    asked, prompts, groups = await service.aside(read)
    sequences = [sequence for group in groups for sequence in group]
    await service.complete(request, sequences)

    def write() -> Response:
        choices = [
            _completion_choice(service.chat, asked, index, prompt, one)
            for index, (prompt, one) in enumerate(
                (prompt, one) for prompt, group in zip(prompts, groups, strict=True) for one in group
            )
        ]
        answer = _head("text_completion", "cmpl", service)
        return _response(asked, answer | {"choices": choices, "usage": _usage(prompts, sequences)})

    return await service.aside(write)


def _completion_choice(
    chat: Chat, asked: wire.CompletionRequest, index: int, prompt: list[int], one: Sequence
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": _text(chat, one),
        "logprobs": None,
        "finish_reason": one.finish_reason,
        "weight_versions": _versions(one),
    }
    if asked.logprobs is not None:
        pieces = _pieces(chat, one)
        offsets = [0, *itertools.accumulate(map(len, pieces))][:-1]
        choice["logprobs"] = {
            "tokens": pieces,
            "token_logprobs": one.logprobs,
            "top_logprobs": None,
            "text_offset": offsets,
        }
    if asked.return_token_ids:
        choice |= {"token_ids": one.token_ids, "prompt_token_ids": prompt}
    return choice


async def chat_completions(service: Service, request: Request) -> Response:
    body = await service.body(request)

    def read() -> tuple[wire.ChatRequest, list[int], list[Sequence]]:
        asked = wire.parse(wire.ChatRequest, body)
        service.check_model(asked.model)
        prompt = _render(service.chat, wire.text_messages(asked.messages))
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        return asked, prompt, service.sequences(prompt, asked, max_tokens, asked.stop)

    asked, prompt, sequences = await service.aside(read)
    await service.complete(request, sequences)

    def write() -> Response:
        answer = _head("chat.completion", "chatcmpl", service) | {
            "choices": [_chat_choice(service.chat, asked, i, one) for i, one in enumerate(sequences)],
            "usage": _usage([prompt], sequences),
        }
        if asked.return_token_ids:
            answer["prompt_token_ids"] = prompt
        return _response(asked, answer)

    return await service.aside(write)


def _render(chat: Chat, messages: list[dict[str, Any]]) -> list[int]:
    """Raises: Refusal, whatever the template makes of messages that it was not written for"""
    try:
        return chat.render(messages)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"The chat template fails on these messages ({error!r}).") from None


def _chat_choice(chat: Chat, asked: wire.ChatRequest, index: int, one: Sequence) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": _text(chat, one)},
        "logprobs": None,
        "finish_reason": one.finish_reason,
        "weight_versions": _versions(one),
    }
    if asked.logprobs:
        choice["logprobs"] = {
            "content": [
                {
                    "token": chat.decode([token], skip_special_tokens=False),
                    "logprob": logprob,
                    "bytes": list(chat.bytes_of(token)),
                    "top_logprobs": [],
                }
                for token, logprob in zip(one.token_ids, one.logprobs, strict=True)
            ]
        }
    if asked.return_token_ids:
        choice["token_ids"] = one.token_ids
    return choice


def _response(asked: wire.Streamed, answer: dict[str, Any]) -> Response:
    """The answer as one object, or, where a stream is asked for, as events: each choice whole, when all are sampled."""
    if not asked.stream:
        return as_json(answer)
    choices, usage = answer.pop("choices"), answer.pop("usage")
    if answer["object"] == "chat.completion":
        answer["object"] = "chat.completion.chunk"
        choices = [{"delta": choice.pop("message"), **choice} for choice in choices]
    chunks = [answer | {"choices": [choice]} for choice in choices]
    if asked.stream_options is not None and asked.stream_options.include_usage:
        chunks = [chunk | {"usage": None} for chunk in chunks] + [answer | {"choices": [], "usage": usage}]
    events = [*map(msgspec.json.encode, chunks), b"[DONE]"]
    body = b"".join(b"data: " + event + b"\n\n" for event in events)
    return Response(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _head(kind: str, prefix: str, service: Service) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(8)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


def _versions(sequence: Sequence) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(span) for span in sequence.spans]


def _usage(prompts: list[list[int]], sequences: list[Sequence]) -> dict[str, int]:
    before, after = sum(map(len, prompts)), sum(len(s.token_ids) for s in sequences)
    return {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}


def _text(chat: Chat, sequence: Sequence) -> str:
    """What the model said, up to a stop string."""
    text = chat.decode(sequence.token_ids)
    return text if sequence.stopped_by is None else text.partition(sequence.stopped_by)[0]


def _pieces(chat: Chat, sequence: Sequence) -> list[str]:
    return [chat.decode([token], skip_special_tokens=False) for token in sequence.token_ids]
