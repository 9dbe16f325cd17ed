"""The user's own code: which files it consists of, read and not run; and every module checked before it runs.

    closure   from the modules that a configuration names, along every import that their text states, lazy ones too
    Watch     a finder before all others: a module of the user is compiled from the very bytes that were hashed

What is *the user's* is decided by place: neither this package, nor the standard library, nor an installed package; a
package that is installed editable lies elsewhere, and is the user's. Of an installed package that such code imports,
version and contents count as a whole.
"""

import ast
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import ratchet
from ratchet.config import EnvConfig
from ratchet.durable import hash_bytes, hash_file
from ratchet.inputs.tree import CODE, Leaves, Tree

_OBJECT = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_][\w.]*")
_IMPORTERS = {"import_module", "__import__"}


def look_here() -> None:
    """Find modules from the working directory on, as a command that is typed there does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


@cache
def _not_own() -> tuple[Path, ...]:
    """Where the standard library, installed packages and this package lie."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = [sysconfig.get_path(name) for name in names]
    found += [*site.getsitepackages(), site.getusersitepackages(), str(Path(ratchet.__file__).parent)]
    return tuple({Path(path).resolve() for path in found if path})


def is_own(path: Path) -> bool:
    """Whether a file is the user's."""
    return not any(path.resolve().is_relative_to(place) for place in _not_own())


def _file_of(spec: ModuleSpec) -> Path | None:
    """The file that a module is made from; None for one that has none: built in, frozen, a mere directory."""
    return Path(spec.origin) if spec.has_location and spec.origin else None


def leaf_of(spec: ModuleSpec, file: Path) -> str:
    """`helpers/units.py` for the module helpers.units, wherever it lies."""
    parts = spec.name.split(".")
    if spec.submodule_search_locations is not None:
        return "/".join([*parts, file.name])
    return "/".join([*parts[:-1], file.name])


def _ask(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """What the other finders say of a module; nothing is run."""
    for finder in sys.meta_path:
        if not isinstance(finder, Watch) and (find := getattr(finder, "find_spec", None)) is not None:
            spec = find(name, path, None)
            if spec is not None:
                return spec
    return None


def _chain(name: str) -> Iterator[ModuleSpec]:
    """The specs of a module and of the packages that it lies in, outermost first, as far as they are there."""
    path: Sequence[str] | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        try:
            spec = _ask(".".join(parts[:depth]), path)
        except (ImportError, ValueError, AttributeError):
            return
        if spec is None:
            return
        yield spec
        path = spec.submodule_search_locations
        if path is None:
            return


class Closure:
    """The files that some modules consist of, and the installed packages that they import."""

    def __init__(self, roots: Iterable[str]) -> None:
        self.leaves: Leaves = {}
        self._packages: set[str] = set()
        self._seen: set[str] = set()
        self._waiting = list(roots)
        while self._waiting:
            self._add(self._waiting.pop())

    def _add(self, name: str) -> None:
        for spec in _chain(name):
            file = _file_of(spec)
            if spec.name in self._seen:
                continue
            self._seen.add(spec.name)
            if file is None or not file.is_file():
                continue
            if not is_own(file):
                self._packages.add(spec.name.partition(".")[0])
                return
            data = file.read_bytes()
            self.leaves[leaf_of(spec, file)] = hash_bytes(data)
            if file.suffix == ".py":
                self._waiting += imports_of(data, spec)

    def packages(self) -> Leaves:
        """Version and contents of each installed package."""
        found: Leaves = {}
        for top in sorted(self._packages - {"ratchet"} - sys.stdlib_module_names):
            for package in _distributions(top):
                found[package.metadata["Name"]] = f"{package.version} {_record_of(package)}"
        return found


def imports_of(source: bytes, spec: ModuleSpec) -> Iterator[str]:
    """The modules that a text imports, anywhere in it; of a name in `from x import name` it may be one too."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # running it will say so
    package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imported_from(node, package)
        elif isinstance(node, ast.Call) and _called(node.func) in _IMPORTERS and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value.lstrip(".")


def _imported_from(node: ast.ImportFrom, package: str) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        try:
            base = importlib.util.resolve_name("." * node.level + base, package or "")
        except ImportError:
            return
    if base:
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _distributions(top: str) -> list[metadata.Distribution]:
    """The installed packages that a module `top` may come from."""
    try:
        return [metadata.distribution(top)]
    except metadata.PackageNotFoundError:
        names = dict.fromkeys(metadata.packages_distributions().get(top, ()))
        return [metadata.distribution(name) for name in names]


def _record_of(package: metadata.Distribution) -> str:
    """One hash of the hashes in its RECORD, without what depends on who installed it, and where."""
    lines = (package.read_text("RECORD") or "").splitlines()
    parts = [line.rsplit(",", 2) for line in lines]
    own = sorted(part[:2] for part in parts if len(part) == 3 and part[1] and _is_content(part[0]))
    return hash_bytes("\n".join(",".join(part) for part in own).encode())


def _is_content(path: str) -> bool:
    return not path.startswith(("..", "/")) and ".dist-info/" not in path


def roots_of(tables: Iterable[EnvConfig]) -> list[str]:
    """The modules that environment tables name: in `id`, and in any argument of the form module:name."""
    found: dict[str, None] = {}
    for table in tables:
        for text in _texts([table.id, table.args]):
            if match := _OBJECT.fullmatch(text):
                found[match[1]] = None
    return list(found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def of_code(tables: Iterable[EnvConfig]) -> Tree:
    """The code of environments and rewards: the user's files, and the installed packages that these import."""
    look_here()
    closure = Closure(roots_of(tables))
    return {CODE: closure.leaves, "env.packages": closure.packages()}


def of_modules(leaves: Iterable[str]) -> Leaves:
    """The files of late modules, as they are now, by the leaves that they are known by; without those that are gone."""
    look_here()
    found: Leaves = {}
    for leaf in leaves:
        name = leaf.rpartition(".")[0].removesuffix("/__init__").replace("/", ".")
        specs = list(_chain(name))
        file = _file_of(specs[-1]) if specs and specs[-1].name == name else None
        if file is not None and file.is_file():
            found[leaf] = hash_file(file)
    return found


class Watch(MetaPathFinder):
    """The finder of this process that knows what the user's modules should be."""

    def __init__(self) -> None:
        self.see: Callable[[str, str], None] = lambda leaf, value: None
        """Called with each module of the user just before it runs; what it raises stops that."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = _ask(fullname, path)
        if spec is None or (file := _file_of(spec)) is None or not is_own(file):
            return spec
        leaf = leaf_of(spec, file)
        if type(spec.loader) is SourceFileLoader:
            spec.loader = _Checked(spec.name, str(file), lambda data: self.see(leaf, hash_bytes(data)))
        elif file.is_file():
            self.see(leaf, hash_file(file))
        return spec


class _Checked(SourceFileLoader):
    """Compiles a module from the bytes that were looked at: a cached compilation may be of older ones."""

    def __init__(self, name: str, path: str, look: Callable[[bytes], None]) -> None:
        super().__init__(name, path)
        self._look = look

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        data = self.get_data(path)
        self._look(data)
        return self.source_to_code(data, path)


@cache
def watch() -> Watch:
    """This process's watch, in place from the first call on."""
    found = Watch()
    sys.meta_path.insert(0, found)
    return found
