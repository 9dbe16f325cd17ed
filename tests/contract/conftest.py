"""A directory to run in, with small data and an environment of its own; a server; a run that nothing disturbed."""

import json

import pytest
from fake_inference import FakeInference
from orchestrated import MY_ENV, complete, parts, settings


@pytest.fixture
async def server():
    server = FakeInference()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 7), ("eval", 3)):
        lines = [json.dumps({"text": f"{name} {'abcdefg'[: i + 1]}"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "my_env.py").write_text(MY_ENV)
    return tmp_path


_reference = {}


@pytest.fixture
async def reference(here, server):
    """An uninterrupted run, made once: neither its directory nor its run id may matter."""
    if not _reference:
        _reference.update(parts(await complete(settings(here / "reference", deterministic=True), server)))
    return _reference
