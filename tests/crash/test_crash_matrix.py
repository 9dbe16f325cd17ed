"""Every durable point of the code, in every phase of a run: die there, run the same command, compare with a run
that was never interrupted."""

import ast
import shutil
from pathlib import Path

import points
import pytest
from phases import KEEP_ALL, PHASES, STEPS, finish, kill
from toy import EVAL_EVERY

from ratchet import attempts, digest, durable, journal, metrics
from ratchet.paths import RunPaths

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "ratchet"
CASES = [(phase, row.name) for phase in points.ALL for row in points.ROWS if phase in row.phases]
MEMORY = (
    *("--weights.transport", "memory", "--weights.publish-interval", "3"),
    *("--orchestrator.eval.interval", str(EVAL_EVERY)),
)
# What a policy passes on its way, and what it goes by.
TRAVELLING = {
    *(f"weights.{place}" for place in ("before_manifest", "before_rename", "after_rename", "committed")),
    *("checkpoint.before_rename", "remove.after_rename", "batch.committed"),
    *("replace.record.json.before_rename", "replace.run.toml.before_rename"),
}
# Where a rollout is finished and nowhere yet.
LOSING = ("journal.before_append", "create.before_rename")


def generated(root):
    """The draws that were sampled, as often as they were."""
    lines = root.with_name(f"{root.name}.generated")
    return [int(line) for line in lines.read_text().split()] if lines.exists() else []


@pytest.mark.parametrize(("phase", "point"), CASES)
def test_killed_at_the_first_a_middle_and_the_last_passage_the_run_ends_the_same(
    toys, calm, tmp_path, phase, point
):
    last = calm(phase).passages[point]
    for number in sorted({1, (1 + last) // 2, last}):
        die_and_continue(toys, calm(phase), tmp_path, phase, point, number)


@pytest.mark.campaign
@pytest.mark.parametrize(("phase", "point"), CASES)
def test_killed_at_any_passage_the_run_ends_the_same(toys, calm, tmp_path, phase, point):
    for number in range(1, calm(phase).passages[point] + 1):
        die_and_continue(toys, calm(phase), tmp_path, phase, point, number)


@pytest.mark.parametrize(("phase", "point"), [case for case in CASES if case[1] in TRAVELLING])
def test_killed_while_policies_go_through_memory_the_run_ends_as_one_by_the_disk(
    toys, calm, tmp_path, phase, point
):
    """No checkpoint falls on a multiple of the interval but by chance, and memory is lost with every death."""
    here = calm(phase, MEMORY)
    assert here.passages[point] > calm(phase).passages[point] // 2
    for number in range(1, here.passages[point] + 1):
        folder, flags = tmp_path / str(number), (*PHASES[phase].flags, *MEMORY)
        shutil.copytree(here.start, folder, symlinks=True)
        root = folder / "run"
        kill(toys, root, *flags, at=f"{point}:{number}")
        finish(toys, root, *flags)
        assert digest.result(root) == digest.result(calm(phase).root), f"{point}:{number}"
        assert memory_of(root) == [], "the memory is not given back"


def memory_of(root):
    run_id = attempts.newest(RunPaths(root)).run_id
    return list(Path("/dev/shm").glob(f"ratchet-*-{run_id}"))


def die_and_continue(toys, calm, tmp_path, phase, point, number):
    folder, flags = tmp_path / str(number), PHASES[phase].flags
    shutil.copytree(calm.start, folder)
    root = folder / "run"
    kill(toys, root, *flags, at=f"{point}:{number}")
    newest, sampled = max(durable.committed(RunPaths(root).checkpoints), default=0), generated(root)
    said = finish(toys, root, *flags).stdout
    assert digest.parts(root) == calm.parts, f"{point}:{number}"
    if phase == points.ROLLBACK:
        check_superseded(root)
    else:
        assert not newest or f"step {newest}" in said, f"{point}:{number}: it did not continue at the newest"
        lost = sampled[-1:] if point in LOSING else []
        assert sorted(generated(root)) == sorted([*range(STEPS + 3), *lost]), f"{point}:{number}"


def check_superseded(root):
    """What a rollback moved aside is there, once."""
    (aside,) = root.glob("superseded/*/metrics/trainer.jsonl")
    assert [row["step"] for row in metrics.read(aside)] == [3, 4, 5, 6, 7]
    (aside,) = root.glob("superseded/*/metrics/evals.jsonl")
    assert [row["step"] for row in metrics.read(aside)] == [4, 7]
    assert len(list(root.glob("superseded/*/batches/step_*"))) == 5
    assert list(root.glob("superseded/*/journal/*.log"))


@pytest.mark.parametrize("phase", points.ALL)
def test_a_phase_is_what_its_name_says_and_passes_the_points_that_its_rows_state(calm, phase):
    plan = attempts.read(RunPaths(calm(phase).root), attempts.numbers(RunPaths(calm(phase).root))[-1]).plan
    assert plan.rollback == (phase == points.ROLLBACK)
    assert (plan.next_batch > plan.step) == (phase == points.REPLAY)
    assert plan.from_checkpoint == (phase != points.FRESH)
    assert set(calm(phase).passages) == {point for name, point in CASES if name == phase}
    assert calm(phase).parts == calm(points.FRESH).parts


def test_a_damaged_journal_is_refused_before_the_start_and_can_be_moved_aside(toys, tmp_path):
    root, whole = tmp_path / "run", tmp_path / "whole"
    kill(toys, root, *KEEP_ALL, at="batch.committed:4")
    path = journal.segments(RunPaths(root))[0]
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    before = generated(root)
    refused = toys.run(root, *KEEP_ALL, steps=STEPS)
    assert refused.returncode == 2
    assert f"{path.relative_to(tmp_path)} is damaged at byte" in refused.stderr
    assert path.exists()
    done = finish(toys, root, *KEEP_ALL, "--ckpt.resume-step", "-1", "--ckpt.on-corrupt", "fallback")
    assert "its rollouts are sampled again" in done.stdout
    assert [p.read_bytes() for p in root.glob(f"superseded/*/journal/{path.name}")] == [data]
    assert len(generated(root)) > len(set(generated(root))) >= len(before)
    finish(toys, whole, *KEEP_ALL)
    assert digest.parts(root) == digest.parts(whole)


def test_two_rollbacks_in_a_row_end_the_same(toys, tmp_path):
    root, whole = tmp_path / "run", tmp_path / "whole"
    finish(toys, root, *KEEP_ALL)
    kill(toys, root, *KEEP_ALL, "--ckpt.resume-step", "4", at="checkpoint.committed:1")
    finish(toys, root, *KEEP_ALL, "--ckpt.resume-step", "2")
    finish(toys, whole, *KEEP_ALL)
    assert digest.parts(root) == digest.parts(whole)


def test_an_extended_run_equals_a_long_one(toys, tmp_path):
    root, whole = tmp_path / "run", tmp_path / "whole"
    finish(toys, root, *KEEP_ALL, steps=4)
    finish(toys, root, *KEEP_ALL, "--ckpt.resume-step", "4", steps=8)
    finish(toys, whole, *KEEP_ALL, steps=8)
    assert digest.parts(root) == digest.parts(whole)


def test_without_checkpoints_an_interrupted_run_starts_again_aloud(toys, tmp_path):
    root, whole = tmp_path / "run", tmp_path / "whole"
    kill(toys, root, at="weights.committed:4")
    assert "starting again at step 0" in finish(toys, root).stdout
    finish(toys, whole)
    assert digest.parts(root)["metrics/trainer"] == digest.parts(whole)["metrics/trainer"]


def calls(tree, name):
    """The calls of a function or method of this name, each with the function that it stands in."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name:
                    yield function.name, node


def spelled(node):
    """The name of a point as the code spells it: a string, or one with holes."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
        )
    assert isinstance(node, ast.Constant), f"a durable point is not named by a string: {ast.unparse(node)}"
    return node.value


def trees(*paths):
    return {path: ast.parse(path.read_text()) for path in paths}


def test_the_rows_are_the_durable_points_of_the_code():
    """A new point without a test fails here, a new kind of directory, and a new file that is replaced."""
    source = trees(*SOURCE.rglob("*.py"))
    kinds = {
        ast.literal_eval(keyword.value)
        for tree in source.values()
        for _, call in calls(tree, "Manifest")
        for keyword in call.keywords
        if keyword.arg == "kind"
    }
    replaced = {
        f"{path.relative_to(SOURCE)} {function}"
        for path, tree in source.items()
        for function, call in calls(tree, "replace")
        if ast.unparse(call.func).endswith("stage.replace")
    }
    assert replaced == set(points.REPLACED)
    holes = {"{point}": kinds, "{path.name}": set().union(*points.REPLACED.values())}
    found = set()
    for tree in (*source.values(), *trees(Path(__file__).with_name("toy.py")).values()):
        for _, call in calls(tree, "crash_point"):
            names = {spelled(call.args[0])}
            for hole, values in holes.items():
                names = {name.replace(hole, value) for name in names for value in values}
            found |= names
    assert {row.name for row in points.ROWS} == found
    assert len(points.ROWS) == len(found)


def test_what_the_toy_does_not_have_the_real_programs_die_at():
    real = "".join(path.read_text() for path in (TESTS / "e2e").glob("*.py"))
    elsewhere = [row.name for row in points.ROWS if not row.phases]
    assert elsewhere == [
        *("checkpoint.before_shards", "checkpoint.after_shards"),
        *("mirror.after_file", "mirror.before_manifest", "mirror.committed"),
        "replace.state.json.before_rename",
        "replace.device.json.before_rename",
        "replace.inputs.json.before_rename",
    ]
    assert [name for name in elsewhere if f'"{name}:' not in real] == []
