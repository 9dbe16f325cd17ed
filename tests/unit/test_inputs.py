"""Names of inputs: one tree of content hashes, what code consists of, and what becomes of a change."""

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from ratchet.config import EnvConfig, ModelConfig
from ratchet.durable import hash_bytes
from ratchet.errors import Refusal
from ratchet.inputs import code, files, history
from ratchet.inputs.tree import (
    Accepted,
    InputChanged,
    Inputs,
    inputs,
    reconcile,
    undone,
    value_of,
)

OLD, NEW = {"reward.py": "a" * 32}, {"reward.py": "b" * 32}
KNOWN = inputs({"env.code": OLD, "model.weights": {"model.safetensors": "c" * 32}})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of its own; modules that are imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def write(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_digest_is_that_of_the_groups_and_theirs_of_the_leaves():
    leaves = hash_bytes(b'[["reward.py","%s"]]' % (b"a" * 32))
    assert value_of(OLD) == leaves
    assert inputs({"env.code": OLD}).digest == hash_bytes(b'[["env.code","%s"]]' % leaves.encode())


def test_when_a_late_module_was_met_does_not_count_until_a_change_of_it_is_accepted():
    late = {"late.py": "d" * 32}
    assert inputs({"env.code": OLD, "env.late": late}).digest == inputs({"env.code": OLD}).digest
    change = Accepted(group="env.late", step=3, old=late, new={"late.py": "e" * 32})
    assert inputs({"env.code": OLD}, [change]).digest != inputs({"env.code": OLD}).digest


def test_a_change_is_refused_with_what_it_was_and_is_and_the_value_that_accepts_it():
    value = value_of(NEW)[:6]
    with pytest.raises(InputChanged, match=rf"reward.py aaaaaa -> bbbbbb.*batch 12 on.*env\.code={value}"):
        reconcile(KNOWN, {"env.code": NEW}, step=12)
    with pytest.raises(InputChanged, match=value):
        reconcile(KNOWN, {"env.code": NEW}, accepts=["env.code=000000"], step=12)
    with pytest.raises(Refusal, match="is not of the form GROUP=VALUE"):
        reconcile(KNOWN, {"env.code": OLD}, accepts=["env.code"])


def test_an_accepted_change_is_kept_and_accepting_it_again_does_nothing():
    flag = [f"env.code={value_of(NEW)[:6]}"]
    found = reconcile(KNOWN, {"env.code": NEW}, accepts=flag, step=12)
    assert [str(entry) for entry in found.accepted] == ["from batch 12 on: reward.py aaaaaa -> bbbbbb"]
    assert reconcile(found, {"env.code": NEW}, accepts=flag, step=14) == found
    with pytest.raises(InputChanged):
        reconcile(found, {"env.code": {"reward.py": "9" * 32}}, accepts=flag, step=14)


def test_the_weights_that_every_policy_was_made_from_cannot_be_accepted():
    other = {"model.weights": {"model.safetensors": "0" * 32}}
    with pytest.raises(InputChanged, match="every policy of this run was made from it"):
        reconcile(KNOWN, other, accepts=[f"model.weights={value_of(other['model.weights'])}"])


def test_a_file_that_is_gone_or_new_is_a_change():
    with pytest.raises(InputChanged, match=r"reward\.py aaaaaa -> nothing"):
        reconcile(KNOWN, {"env.code": {}})
    with pytest.raises(InputChanged, match=r"helper\.py nothing -> ffffff"):
        reconcile(KNOWN, {"env.code": {**OLD, "helper.py": "f" * 32}})


@pytest.mark.parametrize(
    ("at", "is_rollback", "is_new"),
    [(12, False, True), (11, False, False), (12, True, False), (13, True, True)],
)
def test_a_rollback_past_an_acceptance_brings_back_the_older_name(at, is_rollback, is_new):
    """Accepted for batch 12: a log that ends there goes on with it, a rollback to step 12 does not know it yet."""
    found = reconcile(KNOWN, {"env.code": NEW}, accepts=[f"env.code={value_of(NEW)[:6]}"], step=12)
    back = undone(found, at=at, is_rollback=is_rollback)
    assert back.groups["env.code"] == (NEW if is_new else OLD)
    assert back == (found if is_new else KNOWN)


def test_code_is_followed_along_every_import_that_its_text_states(here):
    texts = {
        "reward.py": "import pkg.deep\ndef reward(c, r):\n    from late import f\n    return f(c)\n",
        "late.py": "def f(c): return 1\n",
        "pkg/__init__.py": "from .inner import x\n",
        "pkg/inner.py": "from .. import nothing\nx = 1\n",
        "pkg/deep.py": "import importlib\nimportlib.import_module('named')\nfrom pkg import sibling\n",
        "pkg/sibling.py": "",
        "named.py": "",
        "unused.py": "",
        "broken.py": "def (",
    }
    write(here, texts)
    table = EnvConfig(id="rows", args={"reward": "reward:reward", "judge": {"of": ["broken:f"]}})
    found = code.of_code([table])["env.code"]
    assert sorted(found) == [
        *("broken.py", "late.py", "named.py"),
        *("pkg/__init__.py", "pkg/deep.py", "pkg/inner.py", "pkg/sibling.py", "reward.py"),
    ]
    assert found["late.py"] == hash_bytes(b"def f(c): return 1\n")
    (here / "late.py").write_text("def f(c): return 1  # a comment\n")
    assert code.of_code([table])["env.code"]["late.py"] != found["late.py"]


def test_where_code_lies_is_no_part_of_its_name(here, monkeypatch):
    write(here / "one", {"mine.py": "import helper\n", "helper.py": ""})
    (here / "one").rename(here / "two")
    found = []
    for name in ("two", "three"):
        monkeypatch.chdir(here / name if name == "two" else (here / "two").rename(here / "three"))
        monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
        importlib.invalidate_caches()
        found.append(code.of_code([EnvConfig(id="mine:Env")]))
    assert found[0] == found[1]
    assert sorted(found[0]["env.code"]) == ["helper.py", "mine.py"]


def test_an_installed_package_counts_by_its_version_and_its_contents(here, monkeypatch):
    """Not by who installed it, nor by the scripts that name an interpreter."""
    site = here / "site"
    monkeypatch.setattr(code, "_not_own", lambda: (site,))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    write(site, {"judge/__init__.py": ""})
    info = site / "judge-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: judge\nVersion: 1.2\n")

    def seen(*lines):
        (info / "RECORD").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()
        return code.of_code([EnvConfig(id="mine:Env")])["env.packages"]

    write(here, {"mine.py": "from judge import score\nimport json\n"})
    first = seen(
        "judge/__init__.py,sha256=abc,0", "judge-1.2.dist-info/INSTALLER,sha256=x,3", "../bin/j,sha256=y,9"
    )
    assert first == {"judge": f"1.2 {hash_bytes(b'judge/__init__.py,sha256=abc')}"}
    assert seen("judge/__init__.py,sha256=abc,0", "judge-1.2.dist-info/INSTALLER,sha256=z,3") == first
    assert seen("judge/__init__.py,sha256=abd,0") != first


def test_a_module_is_compiled_from_the_bytes_that_were_looked_at(here, monkeypatch):
    """A cached compilation counts as current where size and second of its source are the same."""
    write(here, {"scored.py": "VALUE = 1\n"})
    importlib.import_module("scored")
    stat = (here / "scored.py").stat()
    (here / "scored.py").write_text("VALUE = 2\n")
    os.utime(here / "scored.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    del sys.modules["scored"]
    looked = []
    watch = code.Watch()
    watch.see = lambda leaf, value: looked.append((leaf, value))
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    assert importlib.import_module("scored").VALUE == 2
    assert looked == [("scored.py", hash_bytes(b"VALUE = 2\n"))]


def test_a_module_that_is_refused_is_not_run(here, monkeypatch):
    write(here, {"ruins.py": "open('ran', 'w').close()\n"})
    watch = code.Watch()

    def refuse(leaf, value):
        raise InputChanged(leaf)

    watch.see = refuse
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    with pytest.raises(InputChanged, match=r"ruins\.py"):
        importlib.import_module("ruins")
    assert not (here / "ran").exists()


def test_a_model_is_known_by_its_files_wherever_they_lie(here):
    shutil.copytree("/".join([*files.__file__.split("/")[:-4], "examples/reverse_text/model"]), here / "a")
    (here / "a" / "model.safetensors").write_bytes(b"weights")
    (here / "b").symlink_to("a")
    one, other = (ModelConfig(name=name) for name in ("a", "b"))
    found = files.of_model(one) | files.weights_of(one)
    assert files.of_model(other) | files.weights_of(other) == found
    (here / "a" / "README.md").write_text("not read")
    assert files.of_model(one) | files.weights_of(one) == found
    assert sorted(found) == ["generation_config", "model.config", "model.weights", "template", "tokenizer"]
    for name in (
        "chat_template.jinja",
        "tokenizer.json",
        "generation_config.json",
        "model.safetensors",
        "config.json",
    ):
        path = here / "a" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        changed = files.of_model(one) | files.weights_of(one)
        assert sum(changed[group] != found[group] for group in found) == 1, name
        path.write_bytes(data)


def test_weights_are_hashed_while_they_are_loaded_and_refused_afterwards(here):
    (here / "m").mkdir()
    (here / "m" / "model.safetensors").write_bytes(b"weights")
    model = ModelConfig(name="m")
    known = inputs(files.weights_of(model))
    with files.verified_weights(model, known):
        pass
    (here / "m" / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(InputChanged, match=r"model\.weights"), files.verified_weights(model, known):
        pass


def test_a_path_in_a_table_counts_as_what_lies_there(here):
    (here / "a.jsonl").write_text("{}")
    (here / "b.jsonl").write_text("{}")

    def table(path, *declared, weight=1.0):
        one = EnvConfig(id="rows", name="x", weight=weight, args={"data": path, "more": [path]})
        return files.of_tables([one], {"x": [Path(name) for name in declared]})

    assert table("a.jsonl", "a.jsonl") == table("b.jsonl", "b.jsonl")
    assert table("a.jsonl") != table("b.jsonl")
    assert table("a.jsonl", weight=2.0) != table("a.jsonl")


def test_a_declared_directory_counts_by_every_file_below_it(here):
    (here / "units").mkdir()
    (here / "units" / "a.json").write_text("1")
    before = files.of_declared({"x": [here / "units"]})
    (here / "units" / "b.json").write_text("2")
    assert files.of_declared({"x": [here / "units"]}) != before
    with pytest.raises(Refusal, match="declared as an input of an environment"):
        files.of_declared({"x": [here / "nothing"]})


def record(number, found):
    return SimpleNamespace(attempt=number, inputs=found)


def test_a_line_may_name_other_inputs_only_where_a_change_was_accepted(monkeypatch, tmp_path):
    later = reconcile(KNOWN, {"env.code": NEW}, accepts=[f"env.code={value_of(NEW)[:6]}"], step=2)
    found = {1: later}
    monkeypatch.setattr(history.attempts, "numbers", lambda paths: list(found))
    monkeypatch.setattr(history.attempts, "read", lambda paths, number: record(number, found[number]))
    monkeypatch.setattr(history.seen, "known", lambda paths, record: record.inputs)
    old, new = KNOWN.digest, later.digest
    assert history.problems(tmp_path, [(0, old), (1, old), (2, new), (3, new)]) == []
    assert history.problems(tmp_path, [(0, ""), (1, old), (2, new)]) == []
    assert [step for step, _ in history.problems(tmp_path, [(0, old), (1, new), (2, new)])] == [1]
    assert [step for step, _ in history.problems(tmp_path, [(0, old), (1, "f" * 32)])] == [1]


def test_a_record_without_names_stays_readable():
    assert msgspec.json.decode(b'{"digest":"x"}', type=Inputs) == Inputs(digest="x")
