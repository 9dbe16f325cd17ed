"""The durable points: what the disk holds when a process dies there, and what the same command makes of it.

One row a point. `test_crash_matrix.py` dies at each of them in each of its phases, and compares the rows with the
code; `docs/generate_crash_points.py` writes them into docs/checkpointing.md.
"""

from typing import NamedTuple

FRESH, RESUME, REPLAY, ROLLBACK = "fresh", "resume", "replay", "rollback"
ALL = (FRESH, RESUME, REPLAY, ROLLBACK)
CONTINUED = (RESUME, REPLAY, ROLLBACK)


class Point(NamedTuple):
    """`phases` are those in which the toy passes it; without any, the real programs die there in tests/e2e."""

    name: str
    disk: str
    then: str
    phases: tuple[str, ...] = ALL


def commit(kind: str, older: str, it: str, without: str, made: str, counts: str) -> list[Point]:
    """The four points of the publication of a directory."""
    return [
        Point(f"{kind}.before_manifest", f"{older}; {it} staged, without its manifest", made),
        Point(f"{kind}.before_rename", f"{older}; {it} staged as a whole, where nobody looks", made),
        Point(f"{kind}.after_rename", f"{it}, which a power cut may still take back{without}", counts),
        Point(f"{kind}.committed", f"{it}, for good{without}", counts),
    ]


ROWS = [
    *commit(
        "batch",
        "the log before this batch",
        "the batch",
        "; neither its row nor its line",
        "makes it again, from the rollouts in the journal",
        "replays it; row and line are appended at the start",
    ),
    Point(
        "toy.before_row",
        "the batch, which carries its metric row",
        "the row is appended at the start",
    ),
    Point(
        "toy.before_line",
        "the batch and its row; no line in the ledger, which is made from the batch",
        "the line is appended at the start",
    ),
    *commit(
        "weights",
        "the policies before this one",
        "the policy",
        "",
        "trains the step again and publishes it",
        "trains the step again if no checkpoint has it; the policy stays as it is",
    ),
    Point(
        "checkpoint.before_shards",
        "the older checkpoints",
        "continues at the newest of them, replays the log",
        (),
    ),
    Point(
        "checkpoint.after_shards",
        "the older checkpoints; the shards staged",
        "continues at the newest of them, replays the log",
        (),
    ),
    *commit(
        "checkpoint",
        "the older checkpoints",
        "the checkpoint",
        "; what it makes superfluous is still there",
        "continues at the newest of them, replays the log",
        "continues there; what is superfluous goes after the next save, or at the end",
    ),
    Point(
        "mirror.after_file",
        "the checkpoint; in its mirror an entry without its manifest",
        "the entry does not count; it is uploaded at the start, and what was begun is deleted",
        (),
    ),
    Point(
        "mirror.before_manifest",
        "the checkpoint; in its mirror every file of it, and no manifest",
        "the entry does not count; it is uploaded at the start, and what was begun is deleted",
        (),
    ),
    Point(
        "mirror.committed",
        "the checkpoint, and its mirror; there, what it makes superfluous is not deleted yet",
        "it is found there; what is superfluous goes after the next upload",
        (),
    ),
    *commit(
        "eval",
        "the evaluations before this one",
        "the evaluation",
        "; not its row",
        "plays it again, from the same seeds",
        "the row is appended at the start",
    ),
    Point(
        "toy.before_eval_row",
        "the evaluation, which carries its row",
        "the row is appended at the start",
    ),
    Point(
        "create.before_rename",
        "a segment of the journal staged; the rollout that it was begun for is nowhere",
        "that rollout is sampled again",
    ),
    Point("journal.before_append", "nothing of the rollout", "that rollout is sampled again"),
    Point("journal.after_append", "the rollout", "it is used and not sampled again"),
    Point(
        "journal.before_trim",
        "a batch, and the segment that it made superfluous",
        "its entries are ignored; it goes after the next batch",
    ),
    Point(
        "remove.after_rename",
        "one checkpoint, batch, policy or segment less; its bytes are in staging",
        "the leftover is removed; the rest of the deletions follow after the next save, or at the end",
    ),
    Point(
        "replace.run.toml.before_rename",
        "no record of the attempt yet, or one that is not carried out",
        "as if the attempt had not begun, or carries its plan out first",
    ),
    Point(
        "replace.record.json.before_rename",
        "the record without what was to be added: the plan, that it is carried out, the outcome",
        "as if the attempt had not begun, or carries its plan out first, or finds nothing left to train",
    ),
    *(
        Point(
            f"replace.{name}.jsonl.before_rename",
            f"the plan; {what} not cut yet",
            "carries the plan out first: they are cut where it starts",
            CONTINUED,
        )
        for name, what in (
            ("trainer", "the trainer's rows"),
            ("orchestrator", "the orchestrator's rows"),
            ("evals", "the rows of evaluations"),
            ("ledger", "the ledger's lines"),
        )
    ),
    Point(
        "rollback.moved",
        "the plan; some of the names that it moves aside are moved",
        "carries the plan out first: the rest is moved",
        (ROLLBACK,),
    ),
    Point(
        "replace.state.json.before_rename",
        "rows in the trackers; how far they were copied not noted yet",
        "copies them again, and the later copy counts",
        (),
    ),
    Point(
        "replace.device.json.before_rename",
        "the plan; what this program computes on not noted yet, but before, if it was",
        "notes it before it computes",
        (),
    ),
    Point(
        "replace.inputs.json.before_rename",
        "the plan; an input that only this program saw (a module imported late) not noted yet",
        "notes it before what it names is used",
        (),
    ),
]

REPLACED = {
    "attempts.py write": {"record.json"},
    "models/device.py note": {"device.json"},
    "inputs/seen.py _note": {"inputs.json"},
    "launch/opening.py _begin": {"run.toml"},
    "launch/opening.py _carry_out": {"run.toml"},
    "ledger.py restore": {"ledger.jsonl"},
    "metrics.py rewind": {"trainer.jsonl", "orchestrator.jsonl", "evals.jsonl"},
    "report/tracker/follow.py save": {"state.json"},
    "resume.py _rewind": {"trainer.jsonl", "orchestrator.jsonl", "evals.jsonl"},
}
"""Who puts a file in place of its older version, and which: the names that `replace.{path.name}` stands for."""


def table() -> str:
    """The rows as a table of Markdown."""
    lines = ["| at | the disk holds | the same command | killed there in |", "|---|---|---|---|"]
    for row in ROWS:
        phases = "all four" if row.phases == ALL else ", ".join(row.phases) or "`tests/e2e`"
        lines.append(f"| `{row.name}` | {row.disk} | {row.then} | {phases} |")
    return "\n".join(lines) + "\n"
