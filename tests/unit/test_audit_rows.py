"""The audit of an SFT run made by hand: three steps of 8 rows, two of 16, of data that has 24."""

import msgspec
import pytest

from ratchet import attempts, audit, checkpoint, durable, metrics
from ratchet.attempts import Plan, Record
from ratchet.audit_rows import PROGRESS, reconcile
from ratchet.cli.ckpt import comparing
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.stage import Stage

SIZES = (8, 8, 8, 16, 16)
TOTALS = (8, 16, 24, 40, 56)
META = {"data_rows": 24, "rows_from": 0}


def row(step):
    """A row of ten tokens a sample."""
    total = TOTALS[step - 1]
    return {
        "step": step,
        "tokens": 10 * SIZES[step - 1],
        "samples": SIZES[step - 1],
        "progress/total_samples": total,
        "progress/total_tokens": 10 * total,
    }


def save(stage, step, meta, wrong):
    total = TOTALS[step - 1]
    directory = checkpoint.begin(stage, step)
    progress = Progress(step=step, total_samples=total, total_tokens=10 * total)
    for name, value in wrong.items():
        setattr(progress, name, value)
    (directory / PROGRESS).write_bytes(msgspec.json.encode(progress))
    meta = meta | {"metrics": metrics.mark(stage.paths.metric("trainer"))}
    checkpoint.commit(
        stage,
        directory,
        step=step,
        attempt=1,
        world_size=1,
        entries=durable.seal(directory, [PROGRESS]),
        meta=meta,
        versions={},
    )


@pytest.fixture
def make(tmp_path):
    """`saved`: the meta of each checkpoint; `wrong`: what the progress of checkpoint 4 states instead."""

    def made(saved=None, **wrong):
        saved = {2: META, 4: META} if saved is None else saved
        paths = RunPaths(tmp_path)
        for directory in (paths.staging, paths.checkpoints, paths.metrics, paths.attempt(1)):
            directory.mkdir(parents=True)
        stage = Stage.open(paths, "001.trainer.1")
        attempts.write(
            stage,
            Record(
                attempt=1,
                kind="sft",
                run_id="x",
                lineage=0,
                argv=[],
                resume_step=None,
                plan=Plan(),
                applied=True,
                config_xxh3="",
            ),
        )
        for step in range(1, 6):
            metrics.append(stage, paths.metric("trainer"), row(step))
            if step in saved:
                save(stage, step, saved[step], wrong if step == 4 else {})
        return paths

    return made


def edit(paths, *rows):
    """Other rows than the run wrote."""
    paths.metric("trainer").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in rows))


def said(paths):
    """Without the note about inputs, of which these runs record none."""
    return [line for line in comparing._report_lines(audit.audit(paths)) if "names of its inputs" not in line]


def test_how_often_each_row_was_trained_follows_from_the_sum(make):
    """56 = 2 * 24 + 8."""
    paths = make()
    assert said(paths) == ["clean", "24 rows: each 2 or 3 times; 56 consumed, epoch 2.33"]
    report = audit.audit(paths).rows
    assert (report.trained, report.data_rows, report.least, report.once_more) == (56, 24, 2, 8)


def test_whole_epochs_and_a_part_of_the_first_are_said_as_what_they_are(make):
    paths = make({4: META | {"data_rows": 6144}})
    assert said(paths)[1] == "6144 rows: each 0 or 1 times; 56 consumed, epoch 0.01"
    report, _, _ = reconcile(paths)
    assert str(msgspec.structs.replace(report, trained=12288, least=2, once_more=0)) == (
        "6144 rows: each 2 times; 12288 consumed, epoch 2.00"
    )


def test_a_running_run_without_a_step_is_clean(make):
    paths = make({})
    edit(paths)
    assert said(paths)[:2] == ["clean", "0 rows consumed"]


def test_without_a_checkpoint_that_says_it_the_number_of_rows_is_not_known(make):
    """Older versions did not write it."""
    (verdict, count, note) = said(make({2: {}, 4: {}}))
    assert note.startswith("note: how many rows the data has is not known")
    assert (count, verdict) == ("56 rows consumed", "clean")


@pytest.mark.parametrize(("since", "is_known"), [(3, True), (5, False)])
def test_what_an_older_version_trained_in_batches_of_several_sizes_is_not_counted(make, since, is_known):
    """Its place followed from the step: rows were skipped where the size changed. Up to step 3 it did not."""
    report, problems, notes = reconcile(make({2: {}, 4: META | {"rows_from": since}}))
    assert problems == []
    assert report.data_rows == (24 if is_known else None)
    assert [f"up to step {since} an older version" in note for note in notes] == ([] if is_known else [True])


def skipping(step):
    """Two rows of the third step were skipped."""
    total = {"progress/total_skipped": 2} if step >= 3 else {}
    return row(step) | total | ({"samples": 6, "data/skipped": 2} if step == 3 else {})


def test_rows_that_were_skipped_are_consumed_too(make):
    paths = make({4: META}, total_skipped=2)
    edit(paths, *map(skipping, range(1, 6)))
    report, problems, _ = reconcile(paths)
    problems = [problem for problem in problems if "that checkpoints/step_4 was saved with" not in problem[1]]
    assert problems == []
    assert (report.trained, report.skipped) == (56, 2)


@pytest.mark.parametrize(
    ("stated", "change", "says"),
    [
        (1, {}, "checkpoints/step_4 states total_skipped 1, the rows add up to 2."),
        (
            2,
            {"data/skipped": 1},
            "the row of step 3 states total_samples 24, the rows add up to 23; so 2 more.",
        ),
        (2, {"progress/total_skipped": 3}, "the row of step 3 states total_skipped 3, the rows add up to 2."),
    ],
)
def test_a_count_of_skipped_rows_that_does_not_reconcile_is_a_finding(make, stated, change, says):
    paths = make({4: META}, total_skipped=stated)
    edit(paths, *(skipping(step) | (change if step == 3 else {}) for step in range(1, 6)))
    _, problems, _ = reconcile(paths)
    assert says in [detail for _, detail in problems]


EDITS = [
    (
        "a count of one row",
        [row(1), row(2), row(3) | {"samples": 9}, row(4), row(5)],
        "the row of step 3 states total_samples 24, the rows add up to 25; so 2 more.",
    ),
    (
        "a total of one row",
        [row(1), row(2), row(3), row(4), row(5) | {"progress/total_samples": 57}],
        "the row of step 5 states total_samples 57, the rows add up to 56.",
    ),
    (
        "a count of tokens",
        [row(1) | {"tokens": 81}, *map(row, (2, 3, 4, 5))],
        "checkpoints/step_4 states total_tokens 400, the rows add up to 401.",
    ),
    ("a row that is gone", [row(1), row(2), row(4), row(5)], "step 4 follows step 2"),
    ("a row that is there twice", [row(1), row(2), row(2), *map(row, (3, 4, 5))], "step 2 follows step 2"),
    ("the last rows are gone", [row(1), row(2)], "they end at step 2, checkpoint 4 is there."),
    (
        "another loss",
        [row(1) | {"loss": 0.1}, *map(row, (2, 3, 4, 5))],
        "up to step 2 they are not those that checkpoints/step_2 was saved with.",
    ),
]


@pytest.mark.parametrize(("rows", "says"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_an_edited_metric_row_is_a_finding(make, rows, says):
    paths = make()
    edit(paths, *rows)
    found = said(paths)
    assert any(says in line for line in found if line.startswith("PROBLEM"))
    assert "how often each row was trained is not said: the counts do not reconcile" in " ".join(found)
    assert found[0].endswith(("problem", "problems"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"total_samples": 41}, "checkpoints/step_4 states total_samples 41, the rows add up to 40."),
        ({"total_tokens": 0}, "checkpoints/step_4 states total_tokens 0, the rows add up to 400."),
        ({"step": 3}, "checkpoints/step_4 states step 3."),
    ],
)
def test_a_checkpoint_that_counts_otherwise_is_a_finding(make, wrong, says):
    (finding,) = audit.audit(make(**wrong)).findings
    assert finding.detail == says


def test_checkpoints_of_different_data_are_a_finding(make):
    (finding,) = audit.audit(make({2: META, 4: META | {"data_rows": 25}})).findings
    assert finding.detail == "the checkpoints state different numbers of rows: {2: 24, 4: 25}."
