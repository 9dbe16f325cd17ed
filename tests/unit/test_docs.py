"""What the documentation shows is run: its blocks of Python are executed as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from ratchet.envs.base import Score, Transcript

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def said(*contents):
    roles = ("user", "assistant")
    return Transcript(tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)), "stop")


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
