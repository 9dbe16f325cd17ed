"""Lists the pages of docs/decisions/ in the navigation, the newest last, without naming each in mkdocs.yml."""

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Called by mkdocs with its configuration, before it looks at the files."""
    docs = Path(config["docs_dir"])
    found = [str(path.relative_to(docs)) for path in sorted(docs.glob("decisions/*.md"))]
    nav = [entry for entry in config["nav"] if "Decisions" not in entry]
    config["nav"] = [*nav, {"Decisions": found}] if found else nav
    return config
