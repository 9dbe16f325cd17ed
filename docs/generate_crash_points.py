"""Write the table of durable points in docs/checkpointing.md from the tests that die there; `--check` fails if it is
out of date."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "checkpointing.md"
BEGIN = "<!-- written by `uv run python docs/generate_crash_points.py` from tests/crash/points.py -->\n"
END = "<!-- end -->\n"


def page(text: str) -> str:
    """The page with the table as it is in the tests."""
    sys.path.insert(0, str(ROOT / "tests" / "crash"))
    from points import table

    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"docs/checkpointing.md lacks the lines that the table stands between: {BEGIN}{END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    text = PAGE.read_text()
    if "--check" not in sys.argv:
        PAGE.write_text(page(text))
    elif page(text) != text:
        sys.exit("docs/checkpointing.md is out of date: run `uv run python docs/generate_crash_points.py`.")


if __name__ == "__main__":
    main()
