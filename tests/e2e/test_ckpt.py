"""The `ckpt` commands on a real run: what they say, what they prove, and what an audit catches."""

import json
import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from test_rl import ALONE
from transformers import AutoModelForCausalLM

from programs import rows, run, run_digest
from ratchet import attempts, batchlog, ledger
from ratchet.paths import RunPaths
from ratchet.stage import Stage

COMMAND = (*ALONE, "--deterministic", "--max-steps", "4", "--ckpt.interval", "2", "--ckpt.keep-interval", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "run"
    run("rl", *COMMAND, "--output-dir", root)
    return root


@pytest.fixture
def copy(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    return root


def ask(*arguments, code=0):
    return json.loads(run("ckpt", *arguments, "--json", code=code))


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_lines(root):
    return [entry for entry, _ in ledger.checked(RunPaths(root).ledger)]


def write_lines(root, lines):
    """Write a ledger whose chain is sound."""
    before, data = "", b""
    for line in lines:
        line = ledger.chained(line, before)
        before, data = line.hash, data + ledger.encode(line)
    RunPaths(root).ledger.write_bytes(data)


def forget_batches(root):
    """As if retention had deleted all but the last."""
    for step in range(3):
        shutil.rmtree(RunPaths(root).batch(step))


def test_a_finished_run_is_clean(finished):
    report = ask("audit", finished)
    assert report["findings"] == []
    assert (report["draws"], report["trained"], report["in_flight"]) == (16, 16, 0)
    assert report["skipped"] == report["duplicated"] == 0
    assert report["ledger_range"] == report["batch_range"] == [0, 3]
    assert report["envs"]["reverse_text"]["most"] == 1
    said = run("ckpt", "audit", finished)
    assert "16 draws = 16 trained + 0 dropped + 0 in flight; 0 skipped, 0 duplicated" in said


def test_a_digest_is_the_same_whichever_batches_are_still_there(finished, copy):
    said = run("ckpt", "digest", finished)
    forget_batches(copy)
    assert run("ckpt", "digest", copy) == said
    shutil.rmtree(RunPaths(copy).batch(3))
    assert run("ckpt", "digest", copy) == said
    assert ask("digest", copy)["digest"] == said.split()[-1] == run_digest(finished)


def test_a_digest_is_another_one_for_each_edit_of_the_ledger(finished, copy):
    forget_batches(copy)
    first, second, *rest = ledger.raw_lines(RunPaths(finished).ledger)
    digests = {run_digest(finished)}
    for lines in ([second, *rest], [first, second.replace(b'"tokens":', b'"tokens":1'), *rest]):
        RunPaths(copy).ledger.write_bytes(b"".join(lines))
        digests.add(run_digest(copy))
    write_lines(copy, [msgspec.structs.replace(line, payload="0" * 32) for line in read_lines(finished)])
    assert len({*digests, run_digest(copy)}) == 4


def test_lines_of_an_older_version_prove_less_and_it_is_said(finished, copy):
    write_lines(copy, [msgspec.structs.replace(line, payload="") for line in read_lines(finished)])
    older = run_digest(copy)
    report = ask("audit", copy)
    assert report["findings"] == []
    assert any("batches 0 to 3 are of an older version" in note for note in report["notes"])
    forget_batches(copy)
    assert run_digest(copy) != older, "the digests of batches are in no line, so the batches are compared"


def test_a_batch_that_its_line_does_not_know_is_compared(finished, copy):
    paths = RunPaths(copy)
    (first, *rest), _ = batchlog.read(paths, 1)
    state, row = batchlog.read_state(paths.batch(1)), batchlog.read_metrics(paths.batch(1))
    shutil.rmtree(paths.batch(1))
    other = [msgspec.structs.replace(first, reward=first.reward + 1), *rest]
    stage = Stage.open(paths, "009.orchestrator.1")
    batchlog.publish(stage, step=1, attempt=1, samples=other, state=state, metrics=row, oldest_served=0)
    assert run_digest(copy) != run_digest(finished)


@pytest.mark.slow
def test_a_digest_is_the_same_whichever_checkpoints_were_saved(finished, tmp_path):
    """As a run that saved once more, when it was stopped, and therefore keeps fewer batches."""
    often = (*COMMAND[:-4], "--ckpt.interval", "1", "--ckpt.keep-last", "1")
    run("rl", *often, "--output-dir", tmp_path)
    assert not RunPaths(tmp_path).batch(2).exists()
    assert run_digest(tmp_path) == run_digest(finished)


def test_the_ledger_proves_what_retention_deleted(copy):
    forget_batches(copy)
    report = ask("audit", copy)
    assert (report["findings"], report["ledger_range"], report["batch_range"]) == ([], [0, 3], [3, 3])


def without_a_draw(root):
    """A draw is gone from the ledger and from its batch; the chain is made anew."""
    forget_batches(root)
    first, *rest = read_lines(root)
    write_lines(root, [msgspec.structs.replace(first, trained=first.trained[1:]), *rest])


def with_a_draw_twice(root):
    forget_batches(root)
    first, second, *rest = read_lines(root)
    second = msgspec.structs.replace(second, trained=[first.trained[2], *second.trained[1:]])
    write_lines(root, [first, second, *rest])


def with_an_edited_line(root):
    path = RunPaths(root).ledger
    task = read_lines(root)[1].trained[0].task
    path.write_bytes(path.read_bytes().replace(task.encode(), b"train/99999"))


def with_a_line_of_another_batch(root):
    first, second, *rest = read_lines(root)
    write_lines(root, [first, msgspec.structs.replace(second, trained=second.trained[:-1]), *rest])


def without_line(number):
    def tamper(root):
        lines = ledger.raw_lines(RunPaths(root).ledger)
        RunPaths(root).ledger.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))

    return tamper


def with_a_false_total(role, total):
    def tamper(root):
        path = RunPaths(root).metric(role)
        old = f'"progress/total_{total}":{rows(root, role)[2][f"progress/total_{total}"]}'.encode()
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, f'"progress/total_{total}":7'.encode()))

    return tamper


def without_a_row(root):
    path = RunPaths(root).metric("trainer")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))


def without_the_end(root):
    """The last batches are gone, from the ledger too: only the checkpoint knows of them."""
    for step in (2, 3):
        shutil.rmtree(RunPaths(root).batch(step))
    write_lines(root, read_lines(root)[:2])


TAMPERED = [
    ("a removed draw", without_a_draw, "skipped: neither trained, nor dropped, nor in flight. Draws: 0"),
    ("a doubled draw", with_a_draw_twice, "duplicated: trained in batch 0, trained in batch 1. Draws: 2"),
    (
        "an edited line",
        with_an_edited_line,
        "ledger: the line of batch 1 is not what the batch holds. Draws: 4",
    ),
    (
        "a rewritten chain",
        with_a_line_of_another_batch,
        "the line of batch 1 is not what the batch holds. Draws: 7",
    ),
    ("the first line removed", without_line(0), "ledger: batch 0 has no line"),
    ("a line removed", without_line(1), "ledger: batch 1 has no line. Draws: 4, 5, 6, 7"),
    ("the end removed", without_the_end, "ledger: nothing accounts for batches 2, 3"),
    ("the last line removed", without_line(3), "ledger: batch 3 has no line"),
    (
        "wrong samples",
        with_a_false_total("trainer", "samples"),
        "trainer's row of step 3 states total_samples 7",
    ),
    ("wrong problems", with_a_false_total("orchestrator", "problems"), "states total_problems 7"),
    ("wrong tokens", with_a_false_total("orchestrator", "tokens"), "orchestrator's row of step 3"),
    ("a removed row", without_a_row, "rows: trainer: the steps have a gap"),
]


@pytest.mark.parametrize(("tamper", "says"), [t[1:] for t in TAMPERED], ids=[t[0] for t in TAMPERED])
def test_an_audit_catches(copy, tamper, says):
    tamper(copy)
    assert says in run("ckpt", "audit", copy, code=1)


def test_an_edit_of_a_line_whose_batch_is_gone_is_caught_by_the_chain(copy):
    with_an_edited_line(copy)
    forget_batches(copy)
    assert "line 2 (batch 1) does not follow the line before it" in run("ckpt", "audit", copy, code=1)


def test_ls_says_why_each_checkpoint_is_kept(finished):
    found = ask("ls", finished)
    assert [row["step"] for row in found["checkpoints"]] == [2, 4]
    assert [row["kept_because"] for row in found["checkpoints"]] == [
        ["keep-interval"],
        ["newest", "keep-interval"],
    ]
    assert found["superseded"] == []


def test_show_tells_what_a_checkpoint_holds(finished):
    found = ask("show", finished, "4")
    assert found["progress"]["total_samples"] == 64
    assert found["learning_rate"]["last_factor"] == 1.0
    assert found["orchestrator"]["next_draw"] == 16
    assert "orchestrator/state.json" in found["parts"]
    assert "there are: 2, 4" in run("ckpt", "show", finished, "3", code=2)


def test_diff_of_two_steps_names_tensors_and_counters(finished):
    assert "no difference" in run("ckpt", "diff", finished, f"{finished}@4")
    found = ask("diff", f"{finished}@2", finished, code=1)
    assert {"key": "progress.step", "a": 2, "b": 4, "mark": ""} in found["counters"]
    assert found["config"] == []
    largest = [tensor["max_abs"] for tensor in found["tensors"]]
    assert largest == sorted(largest, reverse=True)
    weights = [load_file(finished / "weights" / f"step_{step}" / "model.safetensors") for step in (2, 4)]
    by_name = {tensor["name"]: tensor["max_abs"] for tensor in found["tensors"]}
    name = "model.norm.weight"
    assert by_name[f"model.{name}"] == (weights[0][name] - weights[1][name]).abs().max().item()


def test_a_damaged_checkpoint_is_neither_compared_nor_exported_nor_forked(copy, tmp_path):
    victim = copy / "checkpoints" / "step_2" / "trainer" / ".metadata"
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(data)
    for command in (
        ("diff", f"{copy}@2", copy),
        ("export", copy, "2", tmp_path / "model"),
        ("fork", copy, "2", tmp_path / "new"),
    ):
        assert f"{victim.name} is damaged" in run("ckpt", *command, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_plan_touches_nothing_and_the_start_does_what_it_said(copy):
    before = contents(copy)
    assert "complete" in run("ckpt", "plan", copy)
    planned = ask("plan", copy, "--resume-step", "2")
    assert "max_steps is 1" in run("ckpt", "plan", copy, "--max-steps", "1", code=2)
    assert contents(copy) == before
    run("rl", *COMMAND, "--output-dir", copy, "--ckpt.resume-step", "2")
    assert attempts.newest(RunPaths(copy)).plan.supersede == tuple(planned["plan"]["supersede"])
    assert planned["cut"] == {
        "metrics/trainer.jsonl": 2,
        "metrics/orchestrator.jsonl": 2,
        "ledger/ledger.jsonl": 2,
    }
    assert ask("audit", copy)["findings"] == []
    (aside,) = ask("ls", copy)["superseded"]
    assert (aside["entries"]["batches"], aside["entries"]["ledger"]) == (2, 1)


@pytest.mark.slow
def test_an_exported_checkpoint_is_its_policy(finished, tmp_path):
    policy = finished / "weights" / "step_4"
    run("ckpt", "export", finished, "4", tmp_path / "fp32")
    for path in (tmp_path / "fp32").iterdir():
        assert path.read_bytes() == (policy / path.name).read_bytes(), path.name
    assert ask("export", finished, "2", tmp_path / "bf16", "--dtype", "bfloat16")["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16
    expected = load_file(finished / "weights" / "step_2" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16))
    assert "exists already" in run("ckpt", "export", finished, "4", tmp_path / "fp32", code=2)


@pytest.mark.slow
def test_a_fork_continues_exactly_and_leaves_its_origin_alone(finished, tmp_path):
    before, new = contents(finished), tmp_path / "new"
    made = ask("fork", finished, "2", new)
    shards = [root / "checkpoints" / "step_2" / "trainer" / "__0_0.distcp" for root in (finished, new)]
    assert shards[0].samefile(shards[1])
    assert ask("audit", new)["ledger_range"] == [0, 1]
    assert "Continuing at step 2" in run("rl", *COMMAND, "--output-dir", new, "--ckpt.resume-step", "-1")
    assert run_digest(new) == run_digest(finished)
    assert ask("audit", new)["findings"] == []
    assert contents(finished) == before
    first, last = attempts.read(RunPaths(new), 1), attempts.newest(RunPaths(new))
    assert first.forked_from.run_id == attempts.newest(RunPaths(finished)).run_id != last.run_id
    assert last.run_id == made["run_id"] == first.run_id
    assert "exists already" in run("ckpt", "fork", finished, "2", new, code=2)
    assert "there are: 2, 4" in run("ckpt", "fork", finished, "3", tmp_path / "other", code=2)
    assert not (tmp_path / "other").exists()
