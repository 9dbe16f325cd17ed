"""The chat template in one place: what is rendered, what is learnt, what continues a conversation."""

import shutil
from pathlib import Path

import pytest

from ratchet.chat import Chat, UnusableMessages
from ratchet.errors import Refusal

MODEL = "examples/reverse_text/model"
TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]


@pytest.fixture
def chat():
    return Chat.load(MODEL)


def with_template(tmp_path, template):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    return Chat.load(str(tmp_path / "model"))


def show(chat, ids):
    return chat.decode(ids, skip_special_tokens=False)


def test_a_prompt_ends_where_the_model_begins_to_speak(chat):
    assert show(chat, chat.render(TALK[:1])) == "<|user|>ab<|im_end|><|assistant|>"


def test_only_what_the_assistant_says_is_learnt_and_its_end_too(chat):
    ids, mask = chat.render_training(TALK)
    learnt = [token for token, keep in zip(ids, mask, strict=True) if keep]
    assert show(chat, learnt) == "ba<|im_end|>"


def test_a_demonstration_begins_with_the_prompt_that_sampling_would_use(chat):
    ids, mask = chat.render_training(TALK)
    prompt = chat.render(TALK[:1])
    assert ids[: len(prompt)] == prompt
    assert not any(mask[: len(prompt)])
    assert all(mask[len(prompt) :])


def test_a_template_without_generation_blocks_gives_the_same_mask(chat, tmp_path):
    template = Path(MODEL, "chat_template.jinja").read_text()
    plain = template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    other = with_template(tmp_path, plain)
    assert not other.has_generation_blocks
    assert other.render_training(TALK) == chat.render_training(TALK)


def test_every_assistant_turn_is_learnt(chat):
    talk = [*TALK, {"role": "user", "content": "cd"}, {"role": "assistant", "content": "dc"}]
    ids, mask = chat.render_training(talk)
    assert show(chat, [t for t, keep in zip(ids, mask, strict=True) if keep]) == "ba<|im_end|>dc<|im_end|>"


def test_more_turns_append_to_the_sampled_tokens(chat):
    more = [{"role": "user", "content": "again"}]
    after_stop = chat.render_more(TALK, more)
    assert chat.render(TALK[:1]) + chat.encode("ba<|im_end|>") + after_stop == chat.render([*TALK, *more])
    assert show(chat, chat.render_more(TALK, more, is_closed=False)).startswith("<|im_end|><|user|>again")


def test_a_template_that_rewrites_history_is_refused_for_several_turns(tmp_path):
    last_only = (
        "{{ '<|user|>' + messages[-1].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = with_template(tmp_path, last_only)
    with pytest.raises(Refusal, match="rewrites earlier turns"):
        chat.render_more(TALK, [{"role": "user", "content": "again"}])


def test_a_prompt_does_not_depend_on_the_day(tmp_path):
    says_today = "{{ strftime_now('%d %b %Y') }}"
    with pytest.raises(Refusal, match="would be another run: write a date in place"):
        with_template(tmp_path / "a", says_today).render(TALK)
    looks_first = "{% if strftime_now is defined %}" + says_today + "{% else %}26 jul{% endif %}"
    chat = with_template(tmp_path / "b", looks_first)
    assert show(chat, chat.render(TALK)) == "26 jul"


HALF = [{"role": "user", "content": "bad \ud83d emoji"}, TALK[1]]
POWERLINE = [{"role": "user", "content": "the branch \ue0a0 main"}, TALK[1]]


def test_messages_that_have_no_tokens_or_no_marks_are_unusable_and_no_traceback(chat, tmp_path):
    for use in (chat.render, chat.render_training):
        with pytest.raises(UnusableMessages, match="half a character"):
            use(HALF)
    with pytest.raises(UnusableMessages, match=r"U\+E0A0"):
        chat.render_training(POWERLINE)
    assert chat.render(POWERLINE)
    searches = with_template(tmp_path, "{{ messages[0].content.index('!') }}")
    with pytest.raises(UnusableMessages, match="refuses these messages: substring not found"):
        searches.render_training(TALK)


def test_a_demonstration_whose_answers_cannot_be_told_apart_is_unusable(tmp_path):
    """As templates do that drop what was thought in earlier turns."""
    chat = with_template(tmp_path, "{% for m in messages %}{{ m.content if loop.last }}{% endfor %}")
    with pytest.raises(UnusableMessages, match=r"rewrites earlier turns.* add {% generation %} blocks"):
        chat.render_training([*TALK, *TALK])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(Refusal, match="does not exist"):
        Chat.load(str(tmp_path / "nothing" / "here"))
    with pytest.raises(Refusal, match=r"no tokenizer\.json"):
        Chat.load(str(tmp_path))
