"""A curve in characters, for the end of a run on any terminal."""

import itertools
import math
from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """One line of blocks, the lowest value as the lowest block; values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    columns = _resample(finite, min(width, len(finite)))
    low, high = min(columns), max(columns)
    if high == low:
        return _EIGHTHS[4] * len(columns)
    return "".join(_EIGHTHS[1 + round((value - low) / (high - low) * 7)] for value in columns)


def curve(values: Sequence[float], *, width: int = 60, height: int = 6) -> str:
    """Draw values as columns of blocks, with the scale at the left.

    More values than columns are averaged in equal shares; an empty sequence gives an empty string.
    """
    finite = [value for value in values if value == value]
    if not finite:
        return ""
    columns = _resample(finite, min(width, max(len(finite), 1)))
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    heights = [1 + round((value - low) / span * (height * 8 - 1)) for value in columns]
    repeat = 2 if 2 * len(columns) <= width else 1
    lines = []
    for row in reversed(range(height)):
        cells = "".join(_EIGHTHS[min(max(h - row * 8, 0), 8)] * repeat for h in heights)
        label = high if row == height - 1 else low if row == 0 else None
        lines.append(f"{label:8.3f} │{cells}" if label is not None else f"{'':8} │{cells}")
    return "\n".join(lines)


def _resample(values: Sequence[float], columns: int) -> list[float]:
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
