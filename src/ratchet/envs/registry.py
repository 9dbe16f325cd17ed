"""From an environment's id to the environment."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from ratchet.config import EnvConfig
from ratchet.envs.base import Environment
from ratchet.envs.importing import failed, import_object
from ratchet.envs.reverse_text import ReverseText
from ratchet.envs.single_turn import Rows
from ratchet.errors import Refusal
from ratchet.inputs import code, files
from ratchet.inputs.seen import Seen

BUILT_IN: dict[str, Callable[..., Environment]] = {"reverse_text": ReverseText, "rows": Rows}


def build_all(tables: Sequence[EnvConfig], seen: Seen) -> dict[str, Environment]:
    """Every environment by its label; `seen` learns first of their code, then of the files that they read.

    Raises: Refusal with the remedy
    """
    seen.add(code.of_code(tables))
    envs = {table.label: build(table) for table in tables}
    declared = {t.label: [*t.inputs, *map(Path, envs[t.label].inputs)] for t in tables}
    seen.add(files.of_declared(declared) | files.of_tables(tables, declared))
    return envs


def build(config: EnvConfig) -> Environment:
    """Construct the environment that a configuration names. Raises: Refusal with the remedy."""
    factory = _factory(config.id)
    try:
        inspect.signature(factory).bind(**config.args)
    except TypeError as error:
        raise Refusal(
            f"Environment {config.label}: {error}. "
            f"Its args are {inspect.signature(factory)}; correct [orchestrator.env.args]."
        ) from None
    try:
        environment = factory(**config.args)
        size = environment.size
    except Refusal:
        raise
    except Exception as error:
        raise failed(f"Environment {config.label}", error) from None
    if size < 1:
        raise Refusal(f"Environment {config.label} has no training tasks: it needs at least one.")
    return environment


def _factory(name: str) -> Callable[..., Environment]:
    if ":" not in name:
        if name not in BUILT_IN:
            raise Refusal(
                f"There is no environment {name!r}; built in are {', '.join(sorted(BUILT_IN))}; "
                "your own is named as module:Class."
            )
        return BUILT_IN[name]
    found = import_object(name, "id", "a subclass of ratchet.envs.base.Environment")
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise Refusal(f"id = {name!r} is not a subclass of ratchet.envs.base.Environment: make it one.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise Refusal(f"id = {name!r} does not define {missing}: an environment needs them.")
    return found
