"""What can be refused before an RL run starts: environments, prompts, and a server that does not fit."""

import asyncio
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from ratchet import weights
from ratchet.chat import Chat
from ratchet.config import LOWEST_TEMPERATURE, EnvConfig, RLConfig, is_temperature
from ratchet.envs import registry
from ratchet.envs.base import Environment, Message, Split, settle
from ratchet.envs.importing import frames
from ratchet.errors import Refusal
from ratchet.inputs.seen import Seen
from ratchet.log import LOGGER
from ratchet.orchestrator import vllm_fit
from ratchet.orchestrator.client import Models, WeightInfo, foreign, nobody_answers, said_by

T = TypeVar("T")

_PROBE_POLL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SHOWN = 80
# Prompts are measured by their text; of so many tasks at most, spread over the data.
_TASKS_MEASURED = 2000


def check(config: RLConfig, seen: Seen) -> None:
    """Refuse what no orchestrator could run, and see what it is. Needs no network and no torch.

    Raises: Refusal with the remedy
    """
    _check_levels(config)
    check_temperatures(config)
    if not config.orchestrator.env:
        raise Refusal("An RL run needs an environment: add an [[orchestrator.env]] table.")
    chat = Chat.load(config.model.tokenizer or config.model.name)
    envs = registry.build_all(config.orchestrator.env, seen)
    for env_config in config.orchestrator.env:
        _check_env(config, env_config, envs[env_config.label], chat)


def _check_levels(config: RLConfig) -> None:
    if config.max_off_policy_steps < config.max_async_level:
        raise Refusal(
            f"max_off_policy_steps is {config.max_off_policy_steps}, below max_async_level "
            f"{config.max_async_level}: rollouts that were sampled ahead would be dropped as too old; "
            "raise the first or lower the second."
        )


def check_temperatures(config: RLConfig) -> None:
    """Refuse a temperature that a server would refuse, or would sample at otherwise than asked. Raises: Refusal"""
    found = {"sampling": config.orchestrator.sampling.temperature}
    if config.orchestrator.eval is not None:
        found["eval"] = config.orchestrator.eval.temperature
    for section, temperature in found.items():
        if not is_temperature(temperature):
            greedy = ", or 0 for the most probable token each time" if section == "eval" else ""
            raise Refusal(
                f"orchestrator.{section}.temperature is {temperature:g}: it must be a number of at least "
                f"{LOWEST_TEMPERATURE:g}{greedy}."
            )


def _check_env(config: RLConfig, env_config: EnvConfig, env: Environment, chat: Chat) -> None:
    label = env_config.label
    if not re.fullmatch(r"[\w.-]+", label) or label == "metrics":
        raise Refusal(
            f"Environment {label!r} cannot be called so: its name becomes a file name; give it a `name` of "
            "letters, digits, `-`, `_` and `.`, other than `metrics`."
        )
    if config.orchestrator.eval is not None and env.eval_size < 1:
        raise Refusal(
            f"[orchestrator.eval] is given, but environment {label} has no held-out tasks: "
            "give it `eval_data`, or remove the section."
        )
    if config.inference is not None:
        _check_length(config, label, env, chat, config.inference.max_model_len)


def _check_length(config: RLConfig, label: str, env: Environment, chat: Chat, max_model_len: int) -> None:
    """Raises: Refusal for a prompt that leaves no room, or has tokens that the model does not know"""
    vocabulary, positions = _sizes(Path(config.model.name))
    limit, named = max_model_len, "inference.max_model_len"
    if positions is not None and positions < limit:
        limit, named = positions, "the model's max_position_embeddings"
    name, messages = asyncio.run(_longest_prompt(env, label))
    token_ids = chat.render(messages)
    room, what = limit - len(token_ids), f"Task {name} of environment {label}"
    if room < 1:
        raise Refusal(
            f"{what} has a prompt of {len(token_ids)} tokens, which leaves no room for an answer in {named} {limit}: "
            "raise it, or shorten the prompt."
        )
    if vocabulary is not None and max(token_ids, default=0) >= vocabulary:
        raise Refusal(
            f"{what} has token {max(token_ids)} in its prompt, and the model knows {vocabulary}: name the model's own "
            "tokenizer with model.tokenizer."
        )
    if room < (max_tokens := config.orchestrator.sampling.max_tokens):
        LOGGER.warning(
            "%s has a prompt of %d tokens: an answer has room for %d in %s %d, not for sampling.max_tokens %d",
            *(what, len(token_ids), room, named, limit, max_tokens),
        )


def _sizes(model: Path) -> tuple[int | None, int | None]:
    """The tokens and the positions that a model on the disk knows, where it says so."""
    try:
        stated = msgspec.json.decode((model / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return None, None  # a model of a hub; or the trainer's check says what is wrong
    text = stated.get("text_config") or stated
    found = [text.get(name) for name in ("vocab_size", "max_position_embeddings")]
    vocabulary, positions = (size if isinstance(size, int) else None for size in found)
    return vocabulary, positions


async def _longest_prompt(env: Environment, label: str) -> tuple[str, list[Message]]:
    """The first messages with the most text. Raises: Refusal if the environment fails on a task."""
    longest, name, found = -1, "", []
    splits: list[tuple[Split, int]] = [("train", env.size), ("eval", env.eval_size)]
    for split, size in splits:
        for index in range(0, size, -(-size // _TASKS_MEASURED) or 1):
            try:
                task = await settle(env.task(index, split))
                messages = list(await settle(env.messages(task)))
                text = sum(len(str(message["content"])) for message in messages)
            except Exception as error:
                raise Refusal(
                    f"Environment {label} fails on {split} task {index} ({error!r}): correct it or its data."
                    f"{frames(error)}"
                ) from None
            if text > longest:
                longest, name, found = text, task.id, messages
    return name, found


def probe(config: RLConfig) -> None:
    """Refuse a run of whose servers none answers, or one is no server for it. Raises: Refusal."""
    client = config.orchestrator.client
    deadline, is_told = time.monotonic() + client.wait_s, False
    while True:
        healths = {url: _get(f"{url}/health") for url in client.base_url}
        if there := [url for url, heard in healths.items() if heard.body is not None]:
            break
        others = {url: heard.said for url, heard in healths.items() if heard.said}
        if time.monotonic() > deadline:
            raise Refusal(nobody_answers(client.base_url, client.wait_s, others))
        if others and not is_told:
            is_told = True
            for url, said in others.items():
                LOGGER.warning("%s/health answers with %s: waiting up to %g s", url, said, client.wait_s)
        time.sleep(_PROBE_POLL_S)
    if missing := [url for url in client.base_url if url not in there]:
        LOGGER.warning("nobody answers at %s yet: the run starts without", ", ".join(missing))
    for url in there:
        _probe_weights(url, config)


def _probe_weights(url: str, config: RLConfig) -> None:
    directory = Path(config.model.name)
    heard = _get(f"{url}/weight_info")
    if (misfit := vllm_fit.misfit(heard.body, _get(f"{url}/version").body)) is not None:
        raise Refusal(f"The server at {url} {misfit}")
    info = _expected(url, "/weight_info", heard, WeightInfo)
    _expected(url, "/v1/models", _get(f"{url}/v1/models"), Models)
    if (directory / "config.json").is_file():
        _check_architecture(url, info, directory)


def _expected(url: str, path: str, heard: "Heard", shape: type[T]) -> T:
    """What a server of the protocol says there. Raises: Refusal for any other, with what it said instead"""
    if heard.body is None:
        raise Refusal(foreign(url, path, heard.said or "nothing"))
    try:
        return msgspec.json.decode(heard.body, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Refusal(foreign(url, path, heard.said)) from None


def _check_architecture(url: str, info: WeightInfo, directory: Path) -> None:
    """Compare what both state; the server itself compares everything when it is given weights."""
    theirs_all, own = info.architecture_facts, weights.read_facts(directory)
    different = [key for key in own if key in theirs_all and theirs_all[key] != own[key]]
    if different:
        theirs = ", ".join(f"{key} {theirs_all[key]}" for key in different)
        ours = ", ".join(f"{key} {own[key]}" for key in different)
        raise Refusal(
            f"The server at {url} holds another model ({theirs}) than {directory} ({ours}): "
            "start it with this run's model, or set orchestrator.client.base_url."
        )


class Heard(NamedTuple):
    """What came back: the body of a good answer, and what can be said of any; neither where nobody answers."""

    body: bytes | None = None
    said: str = ""


def _get(url: str) -> Heard:
    """Ask as the run's client does, so past any proxy of the environment."""
    try:
        with _OPENER.open(url, timeout=_PROBE_TIMEOUT_S) as response:
            body = response.read()
            return Heard(body, said_by(response.status, response.headers.get("Server"), body))
    except urllib.error.HTTPError as error:
        return Heard(None, said_by(error.code, error.headers.get("Server"), _rest_of(error)))
    except http.client.HTTPException as error:
        return Heard(None, f"no HTTP ({str(error)[:_SHOWN]!r})")
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Heard(None, f"no TLS ({reason})" if isinstance(reason, ssl.SSLError) else "")


def _rest_of(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""
