"""Test modules share `programs.py`; every test runs in the repository's root, where the examples' paths begin."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--vllm-python", help="the interpreter of an environment with vLLM: its tests run too")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
