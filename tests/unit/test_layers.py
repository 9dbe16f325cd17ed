"""The direction of imports, and which modules may know torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "ratchet"

LAYERS = [
    {"records", "errors", "hardware", "paths", "rng"},
    {
        *(
            "address",
            "config",
            "config_io",
            "durable",
            "heartbeat",
            "hub",
            "lane",
            "log",
            "nursery",
            "process",
        ),
        "stage",
    },
    {
        "attempts",
        "audit",
        "audit_rows",
        "batchlog",
        "chat",
        "checkpoint",
        "digest",
        "journal",
        "compare",
        "device_notes",
        "inputs",
        "fork",
        "ledger",
        "memory",
        "metrics",
        "mirror",
        "now",
        "resume",
        "timeline",
        "weights",
    },
    {"envs", "models"},
    {"trainer", "orchestrator", "inference"},
    {"report"},
    {"launch"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PEERS = {"trainer", "orchestrator", "inference"}
WITH_TORCH = {"models", "trainer", "inference"}


def modules():
    return sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.name != "__init__.py")


def part(path):
    """The top-level name below the package that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path):
    """The parts of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ratchet":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ratchet."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ratchet."))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downward_only(path):
    own = part(path)
    for name in imported(path):
        assert LEVEL[name] <= LEVEL[own], f"{own} imports {name}, which lies above it"
        assert not ({own, name} <= PEERS and own != name), f"{own} imports its peer {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_files_that_need_torch_name_it(path):
    if part(path) in WITH_TORCH:
        return
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    assert not {n for n in names if n.split(".")[0] in ("torch", "transformers")}


def test_everything_outside_models_and_engines_imports_without_torch():
    names = [
        ".".join(("ratchet", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in modules()
        if part(path) not in WITH_TORCH and path.name != "__main__.py"
    ]
    names += ["ratchet.models.check", "ratchet.trainer.sft_data", "ratchet.trainer.schedule"]
    code = f"import sys\nfor name in {names!r}: __import__(name)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_runs_in_vllms_environment_needs_no_configuration():
    """That environment has vLLM's pins and not ours: no pydantic_config."""
    code = (
        "import sys\nsys.modules['pydantic_config'] = None\n"
        "import ratchet.address, ratchet.weights, ratchet.inference.adoption, ratchet.heartbeat, ratchet.process"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
