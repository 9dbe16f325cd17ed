"""A report: one HTML file with its data, style and script inside, which opens anywhere and asks nobody for anything."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from ratchet import durable
from ratchet.attempts import Record
from ratchet.errors import Refusal
from ratchet.paths import RunPaths
from ratchet.report.facts import run_facts
from ratchet.report.view import View, Watcher

ROLLOUT_BYTES = 1_500_000
_ASSETS = resources.files("ratchet.report") / "assets"


def write(target: Path, runs: list[RunPaths]) -> None:
    """Write the report of one run, or the comparison of several. Raises: Refusal, Damaged"""
    views = [_look(paths) for paths in runs]
    durable.put(target, build(views))


def write_last(paths: RunPaths, record: Record) -> None:
    """Write the report of an attempt that is about to be closed with the outcome in `record`."""
    view = dataclasses.replace(_look(paths), record=record, now=None)
    durable.put(paths.report, build([view]))


def _look(paths: RunPaths) -> View:
    view = Watcher(paths).look()
    if view is None:
        raise Refusal(f"{paths.root} holds no run: no attempt was recorded in it.")
    return view


def build(views: list[View]) -> bytes:
    """The page of these runs, as they are now."""
    facts = [run_facts(view, rollout_bytes=ROLLOUT_BYTES // len(views)) for view in views]
    return render({"runs": facts})


def render(data: dict[str, Any]) -> bytes:
    """Put data, style and script into the page. Text of a model cannot end the element that it stands in."""
    encoded = msgspec.json.encode(data).replace(b"<", b"\\u003c").replace(b"\xe2\x80\xa8", b"\\u2028")
    page = (_ASSETS / "page.html").read_bytes()
    for name, content in (("css", _asset("page.css")), ("js", _asset("page.js")), ("data", encoded)):
        page = page.replace(b"{{" + name.encode() + b"}}", content, 1)
    return page


def _asset(name: str) -> bytes:
    return (_ASSETS / name).read_bytes()
