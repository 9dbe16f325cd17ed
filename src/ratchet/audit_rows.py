"""How often each row of demonstrations was trained, from the run directory of an SFT run alone.

    rows          trainer                   samples and skipped rows of each step, and totals, against their sum
    checkpoints   progress.json, manifest   totals, and the metric rows that each was saved with, against the same
    manifest      `data_rows`               how many rows the data has: the order of an epoch holds each of them once

Nothing is written. What cannot be proved from what is there is said in `notes`, not passed over.
"""

from collections.abc import Iterator

import msgspec

from ratchet import checkpoint, durable, metrics
from ratchet.durable import hash_bytes
from ratchet.paths import RunPaths, step_name
from ratchet.records import Manifest, Progress

PROGRESS = f"{checkpoint.TRAINER}/progress.json"
DATA_ROWS = "data_rows"
"""In the manifest of a checkpoint: how many rows the data has."""
ROWS_FROM = "rows_from"
"""There, too: since this step the place in the data is the number of rows that were trained, not of the step."""
SKIPPED = "data/skipped"
_TOTALS = {"samples": ("samples", SKIPPED), "tokens": ("tokens",), "skipped": (SKIPPED,)}
"""Of which parts of the rows each total is the sum: a row of data that is skipped is consumed as well."""

Problem = tuple[str, str]
"""What does not reconcile, and how."""


class RowsReport(msgspec.Struct, kw_only=True):
    """How often the rows of the data were trained."""

    trained: int = 0
    """Rows that were consumed, each as often as it was."""
    skipped: int = 0
    """Of them: they cannot be trained."""
    data_rows: int | None = None
    """Rows that the data has; None where the run directory does not say so."""
    least: int | None = None
    """So often each of them was trained at least ..."""
    once_more: int | None = None
    """... and so many of them once more."""

    def __str__(self) -> str:
        skipped = f", {self.skipped} of them skipped" if self.skipped else ""
        if self.data_rows is None or self.least is None:
            return f"{self.trained} rows consumed{skipped}"
        often = f"{self.least} or {self.least + 1} times" if self.once_more else f"{self.least} times"
        epoch = self.trained / self.data_rows
        return f"{self.data_rows} rows: each {often}; {self.trained} consumed{skipped}, epoch {epoch:.2f}"


def reconcile(paths: RunPaths) -> tuple[RowsReport, list[Problem], list[str]]:
    """The report, what does not reconcile, and what is not proved. The run may be going on meanwhile."""
    saved = durable.committed(paths.checkpoints)  # before the rows: they may only become more
    rows = metrics.read(paths.metric("trainer"))
    problems = list(_steps(rows, saved))
    sums = _sums(rows)
    problems += _totals(rows, sums)
    for step, manifest in saved.items():
        problems += _checkpoint(paths, step, manifest, sums)
    last = sums[max(sums)] if sums else dict.fromkeys(_TOTALS, 0)
    trained = last["samples"]
    sizes = {step: manifest.meta[DATA_ROWS] for step, manifest in saved.items() if DATA_ROWS in manifest.meta}
    if len(set(sizes.values())) > 1:
        problems.append(("data", f"the checkpoints state different numbers of rows: {sizes}."))
    report = RowsReport(trained=trained, skipped=last["skipped"])
    if (unknown := _unknown(rows, saved)) or not problems:
        notes = [unknown] if unknown else []
    else:
        notes = ["how often each row was trained is not said: the counts do not reconcile"]
    if not notes:
        report.data_rows = data_rows = sizes[max(sizes)]
        report.least, report.once_more = divmod(trained, data_rows)
    return report, problems, notes


def _unknown(rows: list[metrics.Row], saved: dict[int, Manifest]) -> str:
    """Why it is not known how often each row was trained; nothing if it is."""
    known = [manifest.meta for manifest in saved.values() if DATA_ROWS in manifest.meta]
    if not known:
        return "how many rows the data has is not known: no checkpoint of this version is there, which would say so"
    since = known[-1].get(ROWS_FROM, 0)
    sizes = {row.get("samples", 0) for row in rows if row["step"] <= since}
    if since and len(sizes) > 1:
        had = " and ".join(map(str, sorted(sizes)))
        return (
            f"up to step {since} an older version trained, whose place in the data followed from the step alone, in "
            f"batches of {had} rows: how often each row was trained is not known"
        )
    return ""


def _steps(rows: list[metrics.Row], saved: dict[int, Manifest]) -> Iterator[Problem]:
    steps = [row["step"] for row in rows]
    for before, step in zip([0, *steps], steps, strict=False):
        if step != before + 1:
            yield "rows", f"step {step} follows step {before}: a row is missing or there twice."
    if saved and max(saved) > max(steps, default=0):
        yield "rows", f"they end at step {max(steps, default=0)}, checkpoint {max(saved)} is there."


def _sums(rows: list[metrics.Row]) -> dict[int, dict[str, int]]:
    """The sums after each step; a row that is there twice counts once more."""
    sums: dict[int, dict[str, int]] = {}
    running = dict.fromkeys(_TOTALS, 0)
    for row in rows:
        running = {
            name: running[name] + sum(row.get(part, 0) for part in parts) for name, parts in _TOTALS.items()
        }
        sums[row["step"]] = running
    return sums


def _totals(rows: list[metrics.Row], sums: dict[int, dict[str, int]]) -> Iterator[Problem]:
    for name in _TOTALS:
        absent = 0 if name == "skipped" else None
        wrong = [row for row in rows if row.get(f"progress/total_{name}", absent) != sums[row["step"]][name]]
        if wrong:
            first, others = wrong[0], f"; so {len(wrong) - 1} more" if len(wrong) > 1 else ""
            yield (
                "totals",
                f"the row of step {first['step']} states total_{name} {first.get(f'progress/total_{name}')}, the rows "
                f"add up to {sums[first['step']][name]}{others}.",
            )


def _checkpoint(
    paths: RunPaths, step: int, manifest: Manifest, sums: dict[int, dict[str, int]]
) -> Iterator[Problem]:
    who = f"checkpoints/{step_name(step)}"
    path = paths.checkpoint(step) / PROGRESS
    try:
        progress = msgspec.json.decode(path.read_bytes(), type=Progress)
    except FileNotFoundError:
        if path.parent.exists():  # otherwise retention deleted it meanwhile
            yield "checkpoint", f"{path} is not there."
        return
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        yield "checkpoint", f"{path} does not parse ({error})."
        return
    if progress.step != step:
        yield "checkpoint", f"{who} states step {progress.step}."
    for name in _TOTALS:
        stated = getattr(progress, f"total_{name}")
        if step in sums and stated != sums[step][name]:
            yield "totals", f"{who} states total_{name} {stated}, the rows add up to {sums[step][name]}."
    if mark := manifest.meta.get("metrics"):
        data = paths.metric("trainer").read_bytes()[: mark["bytes"]]
        if hash_bytes(data) != mark["xxh3"]:
            yield "rows", f"up to step {step} they are not those that {who} was saved with."
