"""What can be refused before an RL run starts: environments, prompts, and a server that does not fit."""

import asyncio
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgspec

from ratchet import weights
from ratchet.chat import Chat
from ratchet.config import EnvConfig, RLConfig
from ratchet.envs import registry
from ratchet.envs.base import Environment, Message, Split, settle
from ratchet.envs.importing import frames
from ratchet.errors import Refusal
from ratchet.inputs.seen import Seen
from ratchet.log import LOGGER
from ratchet.orchestrator import vllm_fit
from ratchet.orchestrator.client import WeightInfo, nobody_answers

_PROBE_POLL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
# Prompts are measured by their text; of so many tasks at most, spread over the data.
_TASKS_MEASURED = 2000


def check(config: RLConfig, seen: Seen) -> None:
    """Refuse what no orchestrator could run, and see what it is. Needs no network and no torch.

    Raises: Refusal with the remedy
    """
    _check_levels(config)
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


def _check_length(config: RLConfig, label: str, env: Environment, chat: Chat, limit: int) -> None:
    max_tokens = config.orchestrator.sampling.max_tokens
    name, messages = asyncio.run(_longest_prompt(env, label))
    length = len(chat.render(messages))
    if length + max_tokens > limit:
        raise Refusal(
            f"Task {name} of environment {label} has a prompt of {length} tokens: with "
            f"orchestrator.sampling.max_tokens {max_tokens} it does not fit inference.max_model_len {limit}; "
            "raise the last or lower the second."
        )


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
    """Refuse a run of whose servers none answers, or one holds another architecture. Raises: Refusal."""
    client = config.orchestrator.client
    deadline = time.monotonic() + client.wait_s
    while not (there := [url for url in client.base_url if _get(f"{url}/health") is not None]):
        if time.monotonic() > deadline:
            raise Refusal(nobody_answers(", ".join(client.base_url), client.wait_s))
        time.sleep(_PROBE_POLL_S)
    if missing := [url for url in client.base_url if url not in there]:
        LOGGER.warning("nobody answers at %s yet: the run starts without", ", ".join(missing))
    for url in there:
        _probe_weights(url, config)


def _probe_weights(url: str, config: RLConfig) -> None:
    directory = Path(config.model.name)
    data = _get(f"{url}/weight_info")
    if (misfit := vllm_fit.misfit(data, _get(f"{url}/version"))) is not None:
        raise Refusal(f"The server at {url} {misfit}")
    if not data or not (directory / "config.json").is_file():
        return
    try:
        info = msgspec.json.decode(data, type=WeightInfo)
    except msgspec.DecodeError:
        return  # not the protocol; the orchestrator's own first request says it better
    _check_architecture(url, info, directory)


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


def _get(url: str) -> bytes | None:
    """The body of an answer, or None where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as response:
            return response.read()
    except (urllib.error.URLError, OSError, ValueError):
        return None
