"""Configurations in and out: a command line with its files, the resolved file of an attempt, and what changed.

Every refusal is one sentence. `config/` has the settings themselves.
"""

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_config import ConfigFileError, cli

from ratchet.config import OnResume, RLConfig, RunConfig
from ratchet.errors import Refusal

C = TypeVar("C", bound=RunConfig)


def leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _files(argv: list[str]) -> Iterator[tuple[str, str]]:
    """The (section, path) pairs of `@ file` and `--section @ file`; the root's section is empty."""
    section = ""
    for index, token in enumerate(argv):
        if token.startswith("@"):
            path = token[1:] or (argv[index + 1] if index + 1 < len(argv) else "")
            yield section, path
        section = token[2:] if token.startswith("--") else ""


def _check_facts_agree(cls: type[RunConfig], argv: list[str]) -> None:
    """Raises: Refusal if two files state two values for one fact of the root."""
    facts = set(cls.model_fields) - set(cls.SECTIONS)
    stated: dict[str, tuple[Any, str]] = {}
    for section, path in _files(argv):
        try:
            data = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError):
            return  # the parser says it better
        tables = [data] if section else [data, *(data.get(name, {}) for name in cls.SECTIONS)]
        for table in tables:
            for key, value in leaves({k: v for k, v in table.items() if k in facts}):
                first = stated.setdefault(key, (value, path))
                if first[0] != value:
                    raise Refusal(
                        f"{key} is {first[0]!r} in {first[1]} and {value!r} in {path}: "
                        "write this fact once, or the same in both."
                    )


def load(cls: type[C], argv: list[str]) -> C:
    """Parse a command line with its `@` files.

    Raises: Refusal with one sentence for anything that is not a valid configuration.
    """
    _check_facts_agree(cls, argv)
    try:
        return cli(cls, args=argv)
    except ConfigFileError as error:
        raise Refusal(_one_sentence(cls, error.message)) from None


def _one_sentence(cls: type[RunConfig], message: str) -> str:
    """Fold the parser's multi-line report: `--flag: what is wrong; --flag: what is wrong`."""
    head, *lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return head
    pairs = list(zip(lines[::2], lines[1::2], strict=False))
    return "; ".join(f"{flag}: {_with_hint(cls, flag, what)}" for flag, what in pairs) + "."


def _with_hint(cls: type[RunConfig], flag: str, what: str) -> str:
    """Name the nearest flag to one that does not exist, wherever in the tree it is."""
    if not what.startswith("Extra inputs"):
        return what
    known = [f"--{key.replace('_', '-')}" for key in marks(cls)]
    near = difflib.get_close_matches(flag, known, n=1)
    return "there is no such setting" + (f"; did you mean {near[0]}?" if near else "")


def dump(config: BaseModel) -> dict[str, Any]:
    """The resolved values, without those that are None."""
    return config.model_dump(mode="json", exclude_none=True)


_NOT_THE_COMMAND = (
    # A scheduler may choose other machines for the same run.
    *("trainer.node_rank", "trainer.rendezvous"),
    # What lies there is known by its content.
    *("output_dir", "model.name", "model.tokenizer", "data.name", "orchestrator.env", "accept_changes"),
)


def is_same(old: BaseModel, new: BaseModel) -> bool:
    """Whether two configurations are of one command: where things lie does not count, nor on which machines it runs."""
    return not differences(old, new)


def differences(old: BaseModel, new: BaseModel) -> tuple[str, ...]:
    """The settings in which two configurations are not of one command, with both values; a section that only one of
    them has is named as a whole."""
    one, other = dump(old), dump(new)
    words = {True: "given", False: "not given"}
    found = []
    for name in sorted(n for n in {*one, *other} if (n in one) != (n in other) and n not in _NOT_THE_COMMAND):
        found.append(f"{name}: {words[name in one]} -> {words[name in other]}")
        one.pop(name, None)
        other.pop(name, None)
    before, after = dict(leaves(one)), dict(leaves(other))
    keys = sorted(key for key in {*before, *after} if key not in _NOT_THE_COMMAND)
    found += [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]
    return tuple(found)


def to_toml(config: BaseModel) -> bytes:
    return tomli_w.dumps(dump(config)).encode()


def from_toml(cls: type[C], path: Path) -> C:
    """Read a resolved configuration back. Raises: Refusal if this version cannot read it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path} cannot be read as a configuration: {error}") from None
    return parse_toml(cls, data, str(path))


def parse_toml(cls: type[C], data: bytes, path: str) -> C:
    """A resolved configuration from its bytes; `path` says whose they are. Raises: Refusal"""
    try:
        return cls.model_validate(tomllib.loads(data.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise Refusal(f"{path} cannot be read as a configuration: {error}") from None


class Change(msgspec.Struct, frozen=True):
    """One key whose value differs from the run's last attempt."""

    key: str
    old: Any
    new: Any
    mark: OnResume

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def marks(cls: type[BaseModel], prefix: str = "") -> dict[str, OnResume]:
    """What each leaf of a configuration class allows on resume, by dotted key."""
    found: dict[str, OnResume] = {}
    for name, info in cls.model_fields.items():
        models = [t for t in (info.annotation, *get_args(info.annotation)) if isinstance(t, type)]
        inner = next((t for t in models if issubclass(t, BaseModel)), None)
        mark = next((m for m in info.metadata if isinstance(m, OnResume)), None)
        if mark is not None:
            found[prefix + name] = mark
        elif inner is not None and info.annotation is not None and "list" not in str(info.annotation):
            found |= marks(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = OnResume.ANNOUNCED
    return found


def changes(old: C, new: C) -> list[Change]:
    """What differs between two configurations of one run, with what each difference means on resume."""
    table = marks(type(new))
    if isinstance(new, RLConfig) and new.deterministic:
        table["max_async_level"] = OnResume.FIXED
    before, after = dict(leaves(dump(old))), dict(leaves(dump(new)))
    found = []
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            mark = next(
                (m for k, m in table.items() if key == k or key.startswith(k + ".")), OnResume.ANNOUNCED
            )
            found.append(Change(key, before.get(key), after.get(key), mark))
    return found
