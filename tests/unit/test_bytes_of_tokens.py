"""The bytes of tokens that hold a part of a character, and long texts."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ratchet.chat import Chat
from ratchet.inference import wire
from ratchet.inference.completions import _chat_choice
from ratchet.inference.engine import Sequence

TEXT = "a €5 … \n 😀ß"
"""In UTF-8: 61 20 e2 82 ac 35 20 e2 80 a6 20 0a 20 f0 9f 98 80 c3 9f."""


def byte_level():
    """A token a byte and two of two bytes: "Ġâ" is a space with the first byte of "€", "ðŁ" the first two of "😀"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, "Ġâ", "ðŁ"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "â"), ("ð", "Ł")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end of turn|>"])
    return tokenizer


def byte_fallback():
    """Letters that it knows, and the bytes of all others."""
    names = [*"a5\n", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<|end of turn|>"])
    return tokenizer


@pytest.fixture(params=[byte_level, byte_fallback])
def tokenizer(request):
    return request.param()


@pytest.fixture
def chat(tokenizer):
    return Chat(tokenizer, "{{ messages[0].content }}", {}, [], "a test")


def test_the_bytes_of_the_tokens_are_those_of_the_text(chat):
    token_ids = chat.encode(TEXT)
    cut = [token for token in token_ids if "\ufffd" in chat.decode([token])]
    assert len(cut) > 5, "some hold a part of a character"
    assert b"".join(map(chat.bytes_of, token_ids)) == TEXT.encode()


def test_a_cut_character_has_its_own_bytes_each():
    chat = Chat(byte_level(), "{{ messages[0].content }}", {}, [], "a test")
    assert [chat.bytes_of(token) for token in chat.encode("a €😀")] == [
        b"a", b"\x20\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98", b"\x80",
    ]  # fmt: skip


def test_a_special_token_and_a_replacement_character_are_themselves(tokenizer, chat):
    special = tokenizer.token_to_id("<|end of turn|>")
    assert chat.bytes_of(special) == b"<|end of turn|>"
    assert b"".join(map(chat.bytes_of, chat.encode("\ufffd"))) == b"\xef\xbf\xbd"


def test_the_logprobs_of_a_chat_say_them(chat):
    sequence = Sequence([1], 40, 1.0, 0)
    for token in chat.encode(TEXT):
        sequence.append(token, -1.0, "v")
    asked = wire.ChatRequest(messages=[{"role": "user", "content": "x"}], logprobs=True)
    content = _chat_choice(chat, asked, 0, sequence)["logprobs"]["content"]
    assert bytes(byte for item in content for byte in item["bytes"]).decode() == TEXT
    assert all(item["bytes"] == list(item["token"].encode()) or "\ufffd" in item["token"] for item in content)


def test_a_long_text_has_the_tokens_of_its_parts(chat):
    assert chat.encode(TEXT * 6000) == chat.encode(TEXT) * 6000
