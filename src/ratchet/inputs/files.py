"""Which files a configuration names, each known by its bytes: the model and what it speaks, demonstrations, and what
an environment declares."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

import ratchet
from ratchet import chat, durable, hub, rng
from ratchet.config import EnvConfig, ModelConfig
from ratchet.durable import hash_bytes, hash_file
from ratchet.errors import Refusal
from ratchet.inputs.tree import CONFIG, WEIGHTS, Inputs, Leaves, Tree, reconcile
from ratchet.records import Manifest

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"


def of_program(*, samples: bool) -> Tree:
    """The rules by which this version computes; `samples` says whether the run samples anything."""
    sampler = {"sampler": rng.SAMPLER} if samples else {}
    return {"program": {"ratchet": ratchet.__version__, "renderer": chat.RENDERER, **sampler}}


def of_model(model: ModelConfig) -> Tree:
    """What a model speaks and how it is built; its weights are `weights_of`. Raises: Refusal"""
    source = hub.snapshot(model.name, chat.COPIED)
    own = source if model.tokenizer is None else hub.snapshot(model.tokenizer, chat.COPIED)
    generation = {"model": source / GENERATION} | ({} if own == source else {"tokenizer": own / GENERATION})
    words = (name for name in chat.COPIED if name not in ("config.json", GENERATION, TEMPLATE))
    return {
        CONFIG: _hashed({"config.json": source / "config.json"}),
        "generation_config": _hashed(generation),
        "tokenizer": _hashed({name: own / name for name in words}),
        "template": _hashed({TEMPLATE: own / TEMPLATE}),
    }


def _hashed(paths: Mapping[str, Path]) -> Leaves:
    """The bytes of those that are there. Raises: Refusal"""
    try:
        return {name: hash_file(path) for name, path in paths.items() if path.is_file()}
    except OSError as error:
        raise Refusal(f"{error.filename} cannot be read ({error.strerror}): make it readable.") from None


def has_weights(model: ModelConfig) -> bool:
    return not model.random_init


def weights_of(model: ModelConfig) -> Tree:
    """The weights that a model is loaded from: every byte is read.

    Raises: Refusal; Damaged where the directory states hashes and they are others
    """
    if (stated := check_stated(model)) is not None:
        return {
            WEIGHTS: {file.name: file.xxh3 for file in stated.files if file.name.endswith(".safetensors")}
        }
    directory = hub.snapshot(model.name, ["*.safetensors", "*.json"])
    index = [path for path in directory.glob("*.safetensors.index.json") if path.is_file()]
    return {
        WEIGHTS: _hashed({path.name: path for path in [*sorted(directory.glob("*.safetensors")), *index]})
    }


def check_stated(model: ModelConfig) -> Manifest | None:
    """Read every byte of a model directory that states hashes, as a published policy does. Raises: Damaged"""
    directory = Path(model.name)
    return durable.verify(directory) if (directory / durable.MANIFEST).exists() else None


@contextmanager
def verified_weights(model: ModelConfig, known: Inputs) -> Iterator[None]:
    """Hash the weights in a thread beside the body, which loads them: what is used is what was verified.

    Raises: InputChanged after the body if they are not those of this run
    """
    if not has_weights(model) or WEIGHTS not in known.groups:
        yield
        return
    found: list[Tree | BaseException] = []

    def read() -> None:
        try:
            found.append(weights_of(model))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=read, name="hash-weights", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    reconcile(known, result)


def of_data(path: str) -> Tree:
    """A file of demonstrations. Raises: Refusal"""
    return {"data": _hashed({"rows": Path(path)})}


def of_tables(tables: Iterable[EnvConfig], declared: Mapping[str, Sequence[Path]]) -> Tree:
    """The environments as the configuration states them, where a path to a declared file counts as its content."""
    found = {}
    for table in tables:
        known = {str(path): f"xxh3:{_content(path)}" for path in declared[table.label]}
        value = table.model_dump(mode="json", exclude={"inputs"})
        found[table.label] = hash_bytes(_canonical(_by_content(value, known)))
    return {"env.tables": found}


def _by_content(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _by_content(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_content(item, known) for item in value]
    return known.get(value, value) if isinstance(value, str) else value


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def of_declared(declared: Mapping[str, Sequence[Path]]) -> Tree:
    """The files and directories that each environment says it reads, by its label. Raises: Refusal"""
    found: Leaves = {}
    for label, paths in declared.items():
        for path in paths:
            name = f"{label}/{path.name}"
            while name in found:
                name += "+"
            found[name] = _content(path)
    return {"env.files": found}


def _content(path: Path) -> str:
    """The hash of a file, or of every file below a directory with its name there. Raises: Refusal"""
    try:
        if path.is_dir():
            inner = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            return hash_bytes(_canonical([[str(p.relative_to(path)), hash_file(p)] for p in inner]))
        return hash_file(path)
    except OSError as error:
        raise Refusal(
            f"{path} is declared as an input of an environment, and cannot be read ({error.strerror}): correct the "
            "path; it is relative to the directory in which the command is run."
        ) from None
