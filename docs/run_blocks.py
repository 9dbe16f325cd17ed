"""Run what the documentation shows: `uv run python docs/run_blocks.py [PAGE ...]`; all pages by default.

A marked block is run, or written as a file, as it stands:

    <!-- run -->                  the ```bash block that follows is run
    <!-- file: reward.py -->      the block that follows is written to that file

The marked blocks of a page follow each other in one shell, in an empty directory with the repository's `examples/`.
`uv run` there means the environment that runs this. Exit code 1 if a block fails: which page, line and command.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT_S = 900
JOBS = 2
_BLOCK = re.compile(r"^<!-- (run|file: (\S+)) -->\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"^<!-- (run|file\b.*) -->$", re.MULTILINE)


class Block(NamedTuple):
    """One marked block: a script, or the content of a file."""

    line: int
    file: str | None
    text: str


def blocks(text: str) -> list[Block]:
    """The marked blocks of a page, in order. Raises: ValueError for a mark without a block that fits it."""
    found = [
        Block(text.count("\n", 0, match.start()) + 1, match[2], match[4])
        for match in _BLOCK.finditer(text)
        if match[2] or match[3] == "bash"
    ]
    if len(found) != len(_MARK.findall(text)):
        raise ValueError("a mark is not followed by a block: <!-- run --> stands right before a ```bash line")
    return found


def script(page: list[Block]) -> str:
    """One shell script that stops at the first failure and says at which line of the page."""
    lines = ["set -euo pipefail", "trap 'echo \"failed: block of line $LINE: $BASH_COMMAND\" >&2' ERR"]
    for block in page:
        lines.append(f"LINE={block.line}")
        if block.file is None:
            lines.append(block.text)
        else:
            lines += [f"cat > {block.file} <<'END_OF_FILE'", f"{block.text}END_OF_FILE"]
    return "\n".join(lines)


def run(page: list[Block], name: str) -> bool:
    """Whether every block of a page succeeded; what they said is shown if not."""
    own = {"UV_PROJECT": str(ROOT), "UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1", "NO_COLOR": "1"}
    # Pages share the cores: threads that spin while they wait hold up those that they wait for.
    own["OMP_WAIT_POLICY"] = "passive"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ratchet-docs-") as directory:
        (Path(directory) / "examples").symlink_to(ROOT / "examples")
        code, said = _shell(script(page), directory, {**os.environ, **own})
    outcome = f"exit code {code}" if code else "ok"
    head = said if code else ""
    sys.stdout.write(f"{head}{name}: {len(page)} blocks, {time.monotonic() - began:.0f} s, {outcome}\n")
    sys.stdout.flush()
    return code == 0


def _shell(text: str, directory: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run a script to its end, or to the limit, at which everything that it started ends too."""
    with subprocess.Popen(
        ["bash", "-c", text],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            said, _ = shell.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            said, _ = shell.communicate()
            said += f"not over after {LIMIT_S} s\n"
        return shell.returncode, said


def pages(names: list[str]) -> Iterator[Path]:
    return (Path(name) for name in names) if names else iter(sorted(ROOT.glob("docs/*.md")))


def main() -> None:
    marked = [(found, page.name) for page in pages(sys.argv[1:]) if (found := blocks(page.read_text()))]
    marked.sort(key=lambda page: -len(page[0]))  # the longest first, so that both jobs end together
    with ThreadPoolExecutor(JOBS) as pool:
        results = list(pool.map(lambda page: run(*page), marked))
    sys.stdout.write(f"{sum(results)} passed, {len(results) - sum(results)} failed\n")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
