"""The routes that sample: vLLM's token-in, token-out `generate`, and OpenAI's two."""

import secrets
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ratchet.chat import Chat
from ratchet.inference import wire
from ratchet.inference.engine import Sequence
from ratchet.inference.service import Service, as_json

DEFAULT_MAX_TOKENS = 16
"""Of a completion that does not say: OpenAI's and vLLM's number. A chat may fill what is left."""


async def generate(service: Service, request: Request) -> Response:
    asked = wire.parse(wire.GenerateRequest, await request.body())
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
    asked = wire.parse(wire.CompletionRequest, await request.body())
    service.check_model(asked.model)
    prompts = [
        service.chat.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in wire.prompts_of(asked.prompt)
    ]
    groups = [
        service.sequences(prompt, asked, asked.max_tokens or DEFAULT_MAX_TOKENS, asked.stop)
        for prompt in prompts
    ]
    sequences = [sequence for group in groups for sequence in group]
    await service.complete(request, sequences)
    choices = [
        _completion_choice(service.chat, asked, index, prompt, one)
        for index, (prompt, one) in enumerate(
            (prompt, one) for prompt, group in zip(prompts, groups, strict=True) for one in group
        )
    ]
    return as_json(
        _head("text_completion", "cmpl", service) | {"choices": choices, "usage": _usage(prompts, sequences)}
    )


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
        offsets = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
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
    asked = wire.parse(wire.ChatRequest, await request.body())
    service.check_model(asked.model)
    prompt = service.chat.render(wire.text_messages(asked.messages))
    max_tokens = asked.max_completion_tokens or asked.max_tokens
    sequences = service.sequences(prompt, asked, max_tokens, asked.stop)
    await service.complete(request, sequences)
    answer = _head("chat.completion", "chatcmpl", service) | {
        "choices": [_chat_choice(service.chat, asked, i, one) for i, one in enumerate(sequences)],
        "usage": _usage([prompt], sequences),
    }
    if asked.return_token_ids:
        answer["prompt_token_ids"] = prompt
    return as_json(answer)


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
                {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
                for piece, logprob in zip(_pieces(chat, one), one.logprobs, strict=True)
            ]
        }
    if asked.return_token_ids:
        choice["token_ids"] = one.token_ids
    return choice


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
