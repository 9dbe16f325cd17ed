"""What the documentation shows is run, and what it links to is there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ratchet.envs.base import Score, Transcript

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PAGES += sorted(ROOT.glob("examples/**/README.md"))


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def said(*contents):
    roles = ("user", "assistant")
    return Transcript(tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)), "stop")


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path):
    """Those that GitHub and mkdocs make alike: where they would differ, a link to it works in one place only."""
    found = set()
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.M
    ):
        kept = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        if re.sub(r"\s", "-", kept) == re.sub(r"[-\s]+", "-", kept):
            found.add(re.sub(r"\s", "-", kept))
    return found


def broken_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            yield target


def run_blocks():
    spec = importlib.util.spec_from_file_location("run_blocks", DOCS / "run_blocks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(path):
    assert not list(broken_links(path))


def test_a_link_to_a_page_or_heading_that_is_not_there_is_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# A title\n\n## Who & what\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#a-title) [b](gone.md) [c](there.md#gone) [d](#x) [e](there.md#who-what) `[f](code)`"
    )
    assert list(broken_links(page)) == ["gone.md", "there.md#gone", "#x", "there.md#who-what"]


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_marked_blocks_are_found_and_a_mark_without_one_is_refused():
    parse = run_blocks().blocks
    page = "# T\n\n<!-- run -->\n```bash\nls\n```\n\n```bash\nrm\n```\n\n<!-- file: a/b.py -->\n```python\nx = 1\n```\n"
    assert parse(page) == [(3, None, "ls\n"), (12, "a/b.py", "x = 1\n")]
    for lost in ("<!-- run -->\n\n```bash\nls\n```\n", "<!-- run -->\n```python\nx\n```\n", "<!-- run -->\n"):
        with pytest.raises(ValueError, match="not followed by a block"):
            parse(page + lost)


def test_every_mark_of_the_docs_has_its_block():
    parse = run_blocks().blocks
    assert {p.name for p in DOCS.glob("*.md") if parse(p.read_text())} == {
        "checkpointing.md",
        "quickstart.md",
        "scaling.md",
        "your-data.md",
        "your-environment.md",
    }


def test_blocks_share_a_directory_and_one_that_fails_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: data -->\n```text\n$HOME stays\n```\n\n"
        "<!-- run -->\n```bash\ntest -d examples\ncp data copy\n```\n\n"
        "<!-- run -->\n```bash\ngrep -qxF '$HOME stays' copy\n```\n"
    )
    command = [sys.executable, str(DOCS / "run_blocks.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    page.write_text(page.read_text() + "\n<!-- run -->\n```bash\nfalse\ntrue\n```\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "failed: block of line 17: false" in done.stdout


def test_the_environments_of_the_docs_work_as_shown():
    reward, guessing = python_blocks("environments.md")
    names = {}
    exec(reward, names)
    assert names["correct"](" 5 ", {"answer": "5"}) == 1.0
    exec(guessing, names)
    env = names["GuessTheNumber"](highest=9)
    task = env.task(3, "train")
    (first,) = env.messages(task)
    assert env.step(task, said(first["content"], "2")) == [{"role": "user", "content": "higher"}]
    assert env.step(task, said(first["content"], "2", "higher", "4")) == Score(0.5, {"turns": 2.0})
    assert env.step(task, said(first["content"], "four")) == Score(0.0)


def test_the_table_of_durable_points_is_that_of_the_tests_that_die_there():
    command = [sys.executable, str(DOCS / "generate_crash_points.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
