"""Test modules share `programs.py`; every test runs in the repository's root, where the examples' paths begin."""

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

# Images of containers set it, and then each of the hundreds of programs that tests start would compile torch anew: 14
# CPU seconds of imports in place of 5.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import slurm_cluster  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--vllm-python", help="the interpreter of an environment with vLLM: its tests run too")


def pytest_ignore_collect(collection_path, config):
    """Without vLLM's environment, or Slurm, there is nothing to collect there, and nothing to report as skipped."""
    is_here = {
        "test_vllm.py": lambda: config.getoption("vllm_python") is not None,
        "test_real_slurm.py": slurm_cluster.is_here,
    }
    return None if is_here.get(collection_path.name, lambda: True)() else True


def pytest_collection_modifyitems(config, items):
    """The longest first, so that all processes end together. Without a browser the tests of a page are not there."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    gone = [item for item in items if item.get_closest_marker("browser")]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _no_program_was_here():
    """A command that a test runs in this process sets its log up: the next test begins with the log of none."""
    logger = logging.getLogger("ratchet")
    yield
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
