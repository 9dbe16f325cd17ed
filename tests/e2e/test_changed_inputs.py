"""A run goes on with what it was given: another base, template, tokenizer, reward or helper is found before it is used.

The refused starts of each kind begin from copies of one stopped run, whose model and project are copied along: where
they lie is no part of what they are.
"""

import shutil

import pytest
from given import RL, SHORT, accept, flip, make_model, make_project, run, scale, swap_two_tokens

from programs import ROOT, run_digest
from ratchet import attempts, batchlog, durable, metrics
from ratchet.audit import audit
from ratchet.paths import RunPaths

BASE_RL = ("rl", "@", "examples/reverse_text/rl.toml", *SHORT, "--trainer.threads", "1")
BASE_SFT = (
    *("sft", "@", "examples/reverse_text/sft.toml", "--data.batch-size", "8", "--trainer.threads", "1"),
    *(
        "--max-steps",
        "4",
        "--ckpt.interval",
        "2",
        "--launch.max-restarts",
        "0",
        "--model.random-init",
        "false",
    ),
)
LORA = ("--model.lora.rank", "2", "--model.lora.target-modules", '["q_proj"]')
CHANGES = {
    "weights": ("model.weights", lambda model: scale(sorted(model.glob("*.safetensors"))[0])),
    "a swapped shard": ("model.weights", lambda model: swap(*sorted(model.glob("*.safetensors")))),
    "template": ("template", lambda model: append(model / "chat_template.jinja", " ")),
    "tokenizer": ("tokenizer", lambda model: swap_two_tokens(model / "tokenizer.json")),
    "generation config": ("generation_config", lambda model: append(model / "generation_config.json", "\n")),
}


def append(path, text):
    path.write_text(path.read_text() + text)


def swap(one, other):
    """Two shards under each other's names."""
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def command(base, where):
    return (*base, "--model.name", where / "model", "--output-dir", where / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """By kind, a run that was killed inside its first save: it has no checkpoint, so the base is needed again."""
    made = {}
    for kind, base in (("rl", BASE_RL), ("sft", BASE_SFT)):
        where = tmp_path_factory.mktemp(kind)
        make_model(where / "model")
        run(ROOT, *command(base, where), code=1, RATCHET_CRASH_AT="checkpoint.before_rename:1")
        assert durable.steps(where / "run" / "checkpoints") == []
        made[kind] = where
    return made


@pytest.fixture
def given(stopped, tmp_path):
    """A copy of it, with its model, elsewhere."""

    def copied(kind):
        shutil.copytree(stopped[kind], tmp_path / kind)
        return tmp_path / kind, command(BASE_RL if kind == "rl" else BASE_SFT, tmp_path / kind)

    return copied


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_another_model_under_the_same_name_is_refused(given, kind, change):
    where, again = given(kind)
    group, make = CHANGES[change]
    make(where / "model")
    said = run(ROOT, *again, code=2)
    assert f"An input of this run is not what it was: {group} (" in said
    assert len(attempts.numbers(RunPaths(where / "run"))) == 1
    if kind == "rl" and change == "weights":
        replayed = run(ROOT, "trainer", "--replay", where / "run", "--", code=2)
        assert "Usage" in replayed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_put_back_it_continues_to_the_digest_of_an_undisturbed_run(given, stopped, tmp_path, kind):
    where, again = given(kind)
    calm = tmp_path / "calm"
    shutil.copytree(where / "model", calm / "model")
    run(ROOT, *command(BASE_RL if kind == "rl" else BASE_SFT, calm))
    scale(where / "model" / "model-00001-of-00002.safetensors")
    run(ROOT, *again, code=2)
    shutil.rmtree(where / "model")
    shutil.copytree(calm / "model", where / "model")
    run(ROOT, *again)
    assert run_digest(where / "run") == run_digest(calm / "run")
    said = run(ROOT, "trainer", "--replay", where / "run")
    assert ", 0 different" in said
    assert "model.weights" in said.partition("inputs verified: ")[2]
    scale(where / "model" / "model-00001-of-00002.safetensors")
    assert "model.weights (model-00001-of-00002" in run(ROOT, "trainer", "--replay", where / "run", code=2)
    # A checkpoint is all that a longer run needs: the base is not read again.
    more = ("--max-steps", "6", "--ckpt.resume-step", "-1")
    run(ROOT, *again, *more)
    run(ROOT, *command(BASE_RL if kind == "rl" else BASE_SFT, calm), *more)
    assert run_digest(where / "run") == run_digest(calm / "run")


@pytest.mark.slow
def test_the_base_of_adapters_is_held_to_its_name_beside_every_checkpoint(tmp_path):
    make_model(tmp_path / "model")
    again = (*command(BASE_SFT, tmp_path), *LORA)
    run(ROOT, *again, code=1, RATCHET_CRASH_AT="checkpoint.before_rename:2")
    assert durable.steps(tmp_path / "run" / "checkpoints") == [2]
    scale(sorted((tmp_path / "model").glob("*.safetensors"))[1])
    assert "not what it was: model.weights (" in run(ROOT, *again, code=2)


def test_a_moved_model_and_a_moved_or_linked_run_are_the_same(given, tmp_path):
    where, _ = given("sft")
    (where / "model").rename(where / "elsewhere")
    (where / "run").rename(where / "moved")
    (where / "link").symlink_to("moved")
    said = run(ROOT, *BASE_SFT, "--model.name", where / "elsewhere", "--output-dir", where / "link")
    assert "Attempt 2" in said
    assert "Changed" not in said


# What the project of a user brings.


def journalled(root):
    """Finished rollouts that lie in the journal."""
    from ratchet import journal

    paths = RunPaths(root)
    return [entry for path in journal.segments(paths) for entry in journal.read(path, is_newest=True)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A project whose run was killed when batch 2 was about to be published: its rollouts lie in the journal."""
    project = make_project(tmp_path_factory.mktemp("killed") / "project")
    run(project, *RL, "--output-dir", "calm")
    run(project, *RL, "--output-dir", "run", code=1, RATCHET_CRASH_AT="batch.before_rename:3")
    paths = RunPaths(project / "run")
    assert max(durable.steps(paths.batches)) == 1
    assert len([entry for entry in journalled(paths.root) if entry.draw >= 4]) == 8
    return project


@pytest.fixture
def project(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "project")
    return tmp_path / "project"


EDITS = {
    "the reward": ("reward.py", "+", "- 0.0 +"),
    "a helper": ("helper.py", "aeiou", "aeiouy"),
    "a helper that is imported late": ("later.py", "0.1", "0.2"),
    "a comment": ("reward.py", "import helper\n", "import helper  # mine\n"),
}


def edit(project, name, old, new):
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new))


@pytest.mark.parametrize("what", EDITS)
def test_edited_code_is_refused(project, what):
    edit(project, *EDITS[what])
    said = run(project, *RL, "--output-dir", "run", code=2)
    assert f"env.code ({EDITS[what][0]} " in said
    assert len(attempts.numbers(RunPaths(project / "run"))) == 1


def test_a_declared_file_a_table_and_held_out_tasks_are_refused(project):
    flip(project / "units.json", at=2)
    assert "env.files (mine/units.json " in run(project, *RL, "--output-dir", "run", code=2)
    flip(project / "units.json", at=2)
    append(project / "eval.jsonl", "\n")
    assert "env.files (mine/eval.jsonl " in run(project, *RL, "--output-dir", "run", code=2)
    shutil.copy(project.parent / "project" / "tasks.jsonl", project / "eval2.jsonl")
    edit(project, "rl.toml", "[[orchestrator.env]]\n", "[[orchestrator.env]]\nweight = 2.0\n")
    assert "env.tables (mine " in run(project, *RL, "--output-dir", "run", code=2)


def accepted(project, root):
    """The same command with the flag that its refusal prints, to its end."""
    flag = accept(run(project, *RL, "--output-dir", root, code=2))
    return flag, run(project, *RL, "--output-dir", root, *flag)


def test_an_accepted_change_is_announced_counted_and_never_mixed(project):
    """Eight finished rollouts of before lie in the journal: none of them is trained."""
    old = {entry.draw: entry for entry in journalled(project / "run") if entry.draw >= 4}
    edit(project, *EDITS["a helper"])
    _, said = accepted(project, "run")
    assert "accepted from batch 2 on: helper.py " in said
    paths = RunPaths(project / "run")
    rows = {row["step"]: row for row in metrics.read(paths.metric("orchestrator"))}
    assert [rows[step]["fault/input_changed"] for step in (1, 2, 3, 4)] == [0, 0, 8, 0]
    assert rows[3]["fault/replayed_from_journal"] == 0

    found = batchlog.read(paths, 2)[0]
    assert {sample.draw for sample in found} == set(old)
    report = audit(paths)
    assert report.findings == []
    assert [line.partition(" on: ")[0] for line in report.accepted] == ["from batch 2"]
    assert "accepted: from batch 2 on: helper.py " in run(project, "ckpt", "audit", "run")
    assert "from batch 2 on: helper.py " in run(project, "ckpt", "show", "run", "4")


@pytest.mark.slow
def test_accepted_again_it_is_nothing_new_and_a_rollback_past_it_brings_back_the_older_name(project):
    edit(project, *EDITS["a helper"])
    flag, _ = accepted(project, "run")
    paths = RunPaths(project / "run")
    assert "This run is complete" in run(project, *RL, "--output-dir", "run", *flag)
    back = (*RL, "--output-dir", "run", "--ckpt.resume-step", "2")
    assert "env.code (helper.py " in run(project, *back, code=2)
    shutil.copytree(project / "run", project / "other")
    run(project, *back, *flag)
    assert audit(paths).findings == []
    edit(project, "helper.py", "aeiouy", "aeiou")
    run(project, *RL, "--output-dir", "other", "--ckpt.resume-step", "2")
    assert audit(RunPaths(project / "other")).accepted == []
    assert run_digest(project / "other") == run_digest(project / "calm")


POINTS = (
    "replace.record.json.before_rename:1",
    "replace.record.json.before_rename:2",
    "journal.after_append:1",
    "batch.before_rename:1",
    "batch.committed:1",
    "checkpoint.before_rename:1",
)


@pytest.mark.slow
def test_killed_around_the_acceptance_there_is_one_digest(project):
    edit(project, *EDITS["a helper that is imported late"])
    for number in range(len(POINTS)):
        shutil.copytree(project / "run", project / f"run{number}")
    flag, _ = accepted(project, "run")
    digests = {run_digest(project / "run")}
    for number, point in enumerate(POINTS):
        again = (*RL, "--output-dir", f"run{number}", *flag)
        code = -9 if "record" in point else 1
        run(project, *again, code=code, RATCHET_CRASH_AT=point)
        run(project, *again)
        digests.add(run_digest(project / f"run{number}"))
        assert len(audit(RunPaths(project / f"run{number}")).accepted) == 1
    assert len(digests) == 1


@pytest.mark.slow
def test_a_fork_and_a_mirror_bring_back_the_names_of_their_checkpoint(project):
    mirror = ("--ckpt.mirror", f"file://{project}/mirror", "--ckpt.mirror-keep-last", "9")
    run(project, *RL, "--output-dir", "run", *mirror, "--ckpt.resume-step", "-1", "--max-steps", "2")
    edit(project, *EDITS["the reward"])
    more = ("--output-dir", "run", *mirror, "--ckpt.resume-step", "-1")
    flag = accept(run(project, *RL, *more, code=2))
    run(project, *RL, *more, *flag)
    for step, is_new in ((2, False), (4, True)):
        run(project, "ckpt", "fork", "run", step, f"fork{step}")
        longer = (
            *RL,
            "--output-dir",
            f"fork{step}",
            *mirror[:0],
            "--max-steps",
            "5",
            "--ckpt.resume-step",
            "-1",
        )
        if not is_new:
            assert "env.code (reward.py " in run(project, *longer, code=2)
        run(project, *longer, *(() if is_new else flag))
        assert audit(RunPaths(project / f"fork{step}")).findings == []
    shutil.rmtree(project / "run")
    again = (*RL, "--output-dir", "run", *mirror, "--max-steps", "5", "--ckpt.resume-step")
    assert "env.code (reward.py " in run(project, *again, "2", code=2)
    shutil.rmtree(project / "run")
    run(project, *again, "4")
    assert [line[:12] for line in audit(RunPaths(project / "run")).accepted] == ["from batch 2"]


CHANCE = """import random
import numpy

def reward(completion, row):
    words = {"one", "two", "three", "four", "five", "six", "seven"}
    first = next(iter(words))
    return len(first) + random.random() + numpy.random.rand()
"""


@pytest.mark.slow
def test_chance_in_a_reward_is_a_function_of_its_place(tmp_path):
    project = make_project(tmp_path / "project")
    (project / "reward.py").write_text(CHANCE)
    run(project, *RL, "--output-dir", "calm", PYTHONHASHSEED="random")
    run(project, *RL, "--output-dir", "run", code=1, RATCHET_CRASH_AT="batch.before_rename:2")
    run(project, *RL, "--output-dir", "run")
    assert run_digest(project / "run") == run_digest(project / "calm")
    rewards = [sample.reward for sample in batchlog.read(RunPaths(project / "run"), 3)[0]]
    assert len(set(rewards)) == len(rewards)


@pytest.mark.slow
def test_an_edit_while_the_run_goes_on_ends_it_when_its_reader_is_started_again(project):
    """A dead orchestrator is started again within the attempt; it reads the edited file, and refuses it."""
    (project / "reward.py").write_text(
        REWARD_THAT_EDITS.format(
            helper=repr(str(project / "helper.py")), code=repr("def share(text): return 0\n")
        )
    )
    flags = [flag if flag != "0" else "2" for flag in RL]
    said = run(project, *flags, "--output-dir", "edited", code=2, RATCHET_CRASH_AT="batch.before_rename:2")
    assert "env.code (helper.py " in said
    assert max(durable.steps(project / "edited" / "batches")) == 0


REWARD_THAT_EDITS = """import helper

def reward(completion, row):
    with open({helper}, "w") as file:
        file.write({code})
    return helper.share(completion)
"""
