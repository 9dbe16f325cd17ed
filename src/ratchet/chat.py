"""Messages to tokens and back, once: the one place that knows a model's chat template.

Needs the `tokenizers` library and jinja only, so that the orchestrator and the checks run without torch.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from ratchet import hub
from ratchet.errors import Refusal

FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
]
COPIED = [*FILES, "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"]
"""What a published policy takes over from its model: all that is not a weight."""
RENDERER = "1"
"""How messages become tokens, as a version: a run goes on by the one that it began with."""
Message = dict[str, Any]
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Marks around what the model itself says; from a private-use area, so hardly any text contains them.
_OPEN, _CLOSE, _CONTENT = "\ue0a0", "\ue0a1", "\ue0a2"
# What templates call for today's date. It is not there: templates that look first have a date of their own.
_CLOCK = "strftime_now"
_LONG_TEXT = 50_000
_NO_TEXT = "\ufffd"
_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


def _letters_of_bytes() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: those that print as themselves, the others from U+0100 on.

    Source: bytes_to_unicode of GPT-2's encoder.py
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in printed)
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the part of a template that the model says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if self.environment.globals.get("marks_generation") else text


class UnusableMessages(Refusal):
    """Messages that no template could render, or that this one refuses: of a row or of an environment."""


def check_messages(messages: Sequence[Any]) -> None:
    """Raises: UnusableMessages unless each has a role and a content: text, or nothing beside tool calls"""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UnusableMessages(
                f"a message must be an object with `role` and `content`; {message!r:.200} was given."
            )
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise UnusableMessages(
                f"the `content` of a message must be text; that of role {message['role']!r} is {content!r:.200}."
            )


class Chat:
    """A tokenizer with its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special: dict[str, str],
        stop_token_ids: list[int],
        name: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._name = name
        self.has_generation_blocks = "{% generation" in template or "{%- generation" in template
        self.stop_token_ids = stop_token_ids
        self._plain = self._compile(template, marks_generation=False)
        self._marked = self._compile(template, marks_generation=True)

    @classmethod
    def load(cls, name: str) -> "Chat":
        """Load from a model directory or hub name. Raises: Refusal with the remedy."""
        directory = hub.snapshot(name, FILES)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise Refusal(f"{directory} has no tokenizer.json: name a tokenizer with --model.tokenizer.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise Refusal(f"{path} cannot be read as a tokenizer: {error}.") from None
        settings = _read_json(directory / "tokenizer_config.json")
        template = _template(directory, settings)
        special = {key: _text(settings[key]) for key in _SPECIAL if settings.get(key)}
        return cls(tokenizer, template, special, _stop_token_ids(directory, tokenizer, special), name)

    def _compile(self, template: str, *, marks_generation: bool) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise,
            "marks_generation": marks_generation,
        }
        try:
            return environment.from_string(template)
        except jinja2.TemplateError as error:
            raise Refusal(f"The chat template of {self._name} does not parse: {error}.") from None

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool, marked: bool = False) -> str:
        template = self._marked if marked else self._plain
        check_messages(messages)
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special
            )
        except Exception as error:  # a template computes with what it is given: it may fail of anything
            if _CLOCK in str(error):
                raise Refusal(
                    f"The chat template of {self._name} asks for today's date, with which a run that continues "
                    f"tomorrow would be another run: write a date in place of {_CLOCK}(...)."
                ) from None
            raise UnusableMessages(
                f"The chat template of {self._name} refuses these messages: {error}."
            ) from None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without adding any special token."""
        return self._encoding(text, is_long=len(text) > _LONG_TEXT).ids

    def _encoding(self, text: str, *, is_long: bool = False) -> Encoding:
        """Of a long text by a call that lets other threads go on meanwhile: the same tokens, but not their offsets.

        Raises: UnusableMessages
        """
        try:
            if is_long:
                return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            raise UnusableMessages(
                "The text has half a character (a lone surrogate, such as \\ud83d), of which there are no tokens."
            ) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, in bytes: also the part of a character that alone is no text."""
        text = self.decode([token], skip_special_tokens=False)
        if _NO_TEXT not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token) or ""
        if (one_byte := _BYTE_FALLBACK.fullmatch(name)) is not None:
            return bytes.fromhex(one_byte[1])
        values = [_BYTE_OF.get(letter) for letter in name]
        return text.encode() if None in values else bytes(value for value in values if value is not None)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation, ready for the model to answer."""
        return self.encode(self._text(messages, add_generation_prompt=add_generation_prompt))

    def render_more(
        self, before: Sequence[Message], new: Sequence[Message], *, is_closed: bool = True
    ) -> list[int]:
        """The tokens to append after a sampled answer: the new messages and the generation prompt.

        `before` ends with the model's answer; its tokens are never rendered again. `is_closed` says that the
        sampled tokens ended with a stop token, so the template's own is left out.
        Raises: Refusal if the template rewrites earlier turns.
        """
        head = self._text(before[:-1], add_generation_prompt=True)
        answer = {**before[-1], "content": _CONTENT}
        full = self._text([*before[:-1], answer, *new], add_generation_prompt=True)
        start, found, rest = full.partition(_CONTENT)
        if not found or start != head:
            raise Refusal(
                f"The chat template of {self._name} rewrites earlier turns, so a conversation of several turns "
                "cannot be continued token by token: use a template that only appends."
            )
        token_ids = self.encode(rest)
        if is_closed and token_ids and token_ids[0] in self.stop_token_ids:
            return token_ids[1:]
        return token_ids

    def render_training(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The tokens of a demonstration, and which of them the model is to learn.

        With `{% generation %}` blocks in the template the mask is theirs; otherwise what each assistant
        message adds after the generation prompt. Raises: UnusableMessages
        """
        if self.has_generation_blocks:
            return self._by_blocks(messages)
        return self._by_prefixes(messages)

    def _by_blocks(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        marked = self._text(messages, add_generation_prompt=False, marked=True)
        if any(mark in str(message["content"]) for message in messages for mark in (_OPEN, _CLOSE)):
            raise UnusableMessages(
                "The text has U+E0A0 or U+E0A1, which mark here what the model says: take them out."
            )
        spans, plain, length = [], [], 0
        for index, piece in enumerate(marked.replace(_CLOSE, _OPEN).split(_OPEN)):
            plain.append(piece)
            if index % 2:
                spans.append((length, length + len(piece)))
            length += len(piece)
        encoding = self._encoding("".join(plain))
        return encoding.ids, _within(encoding.offsets, spans)

    def _by_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        text = self._text(messages, add_generation_prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head = self._text(messages[:index], add_generation_prompt=True)
            whole = self._text(messages[: index + 1], add_generation_prompt=False)
            if not (text.startswith(head) and text.startswith(whole)):
                raise UnusableMessages(
                    f"The chat template of {self._name} rewrites earlier turns, so it cannot tell which tokens "
                    "the model says: add {% generation %} blocks to it."
                )
            spans.append((len(head), len(whole)))
        encoding = self._encoding(text)
        return encoding.ids, _within(encoding.offsets, spans)


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens begin inside a span of characters. Both sequences are in order."""
    mask = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        mask[index] = span[0] <= start and end > start
    return mask


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise Refusal(f"{path} is not valid JSON: {error}.") from None


def _template(directory: Path, settings: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    template = path.read_text() if path.exists() else settings.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if not template:
        raise Refusal(
            f"{directory} has no chat template: add a chat_template.jinja, or name another tokenizer with "
            "--model.tokenizer."
        )
    return template


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _stop_token_ids(directory: Path, tokenizer: Tokenizer, special: dict[str, str]) -> list[int]:
    """The tokens that end an answer: those of the generation config, and the tokenizer's end of sequence."""
    stated = _read_json(directory / "generation_config.json").get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return sorted({token for token in itertools.chain(listed, [own]) if token is not None})


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
