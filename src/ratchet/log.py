"""One log format for every program: readable lines on stderr, which the launcher also files."""

import logging
import os
import sys

LOGGER = logging.getLogger("ratchet")


def setup(role: str, level: str = "info") -> logging.Logger:
    """Send this process's log lines to stderr, each with the time and the role that speaks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role:<12} %(levelname).1s %(message)s", "%H:%M:%S"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False
    return LOGGER


def color_is_wanted() -> bool:
    """The NO_COLOR convention, and never into a file."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
