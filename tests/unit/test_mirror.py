"""The mirror against fsspec's own stores: what an entry holds, what is believed, what goes, what a failure costs."""

import shutil
import threading
import time

import msgspec
import pytest

from ratchet import attempts, config_io, durable, metrics
from ratchet.attempts import Assignment, Plan, Record
from ratchet.config import CkptConfig, DataConfig, ModelConfig, SFTConfig
from ratchet.errors import Damaged, Refusal
from ratchet.mirror import upload
from ratchet.mirror.restore import restore
from ratchet.mirror.store import Store, line
from ratchet.mirror.upload import Uploader, retain, send, take
from ratchet.paths import RunPaths
from ratchet.records import Manifest
from ratchet.stage import Stage


def settings(root, url, **ckpt):
    return SFTConfig(
        model=ModelConfig(name="m"),
        max_steps=9,
        data=DataConfig(name="d"),
        output_dir=root,
        ckpt=CkptConfig(interval=1, mirror=url, **ckpt),
    )


def make_run(root, url, *, lineage=0, run_id="abc", **ckpt):
    """An open attempt of a run that trains by hand."""
    paths = RunPaths(root)
    config = settings(root, url, **ckpt)
    for directory in (paths.staging, paths.checkpoints, paths.weights, paths.metrics, paths.attempt(1)):
        directory.mkdir(parents=True)
    stage = Stage.open(paths, "001.trainer.1")
    data = config_io.to_toml(config)
    (paths.attempt(1) / "run.toml").write_bytes(data)
    record = Record(
        attempt=1,
        kind="sft",
        run_id=run_id,
        lineage=lineage,
        argv=["sft"],
        resume_step=None,
        plan=Plan(),
        applied=True,
        config_xxh3=durable.hash_bytes(data),
    )
    attempts.write(stage, record)
    return Assignment(paths, config, Plan(), 1, run_id, lineage, stage)


def save(run, step, data=b"weights"):
    """Train to `step`: its row, its policy, its checkpoint."""
    metrics.append(run.stage, run.paths.metric("trainer"), {"step": step})
    for kind, root in (("weights", run.paths.weights), ("checkpoint", run.paths.checkpoints)):
        directory = run.stage.begin(kind)
        (directory / "data").write_bytes(data + b"%d" % step)
        manifest = Manifest(kind=kind, step=step, attempt=1, files=tuple(durable.seal(directory)))
        run.stage.commit(directory, root / f"step_{step}", manifest)


def mirror(run, step, **data):
    save(run, step, **data)
    send(Store(run.config.ckpt.mirror), take(run, step))


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"{request.param}://{tmp_path / 'mirror'}"


def steps(url):
    return [
        (entry.origin.lineage, entry.step) for entry in sorted(Store(url).entries()[0], key=lambda e: e.order)
    ]


def continue_any(record, config):
    return None


def test_what_was_uploaded_comes_back_byte_for_byte_and_is_a_run(url, tmp_path):
    run = make_run(tmp_path / "run", url)
    mirror(run, 1)
    mirror(run, 2)
    save(run, 3)
    back = RunPaths(tmp_path / "back")
    back.staging.mkdir(parents=True)
    restore(back, 1, settings(back.root, url), continue_any)
    assert list(durable.committed(back.checkpoints)) == list(durable.committed(back.weights)) == [2]
    for name in ("checkpoints/step_2/data", "weights/step_2/MANIFEST.json", "attempts/001/record.json"):
        assert (back.root / name).read_bytes() == (run.paths.root / name).read_bytes()
    assert back.metric("trainer").read_bytes() == b'{"step":1}\n{"step":2}\n'
    last = attempts.newest(back)
    assert (last.attempt, last.run_id, last.lineage, last.outcome.code) == (2, "abc", 1, 75)
    assert (last.restored.mirror, last.restored.step, last.plan.step) == (url, 2, 2)
    assert attempts.read_config(back, last).output_dir == back.root
    assert list(back.staging.iterdir()) == []


def test_an_entry_without_its_manifest_does_not_count_and_goes_later(url, tmp_path):
    run = make_run(tmp_path / "run", url)
    mirror(run, 1)
    save(run, 2)
    store, snapshot = Store(url), take(run, 2)
    with pytest.raises(upload.Abandoned):
        send(store, snapshot, is_abandoned=iter([False, False, True]).__next__)
    assert len(store.names()) == 2
    assert steps(url) == [(0, 1)]
    mirror(run, 3)
    retain(store, run.config.ckpt)
    assert steps(url) == [(0, 1), (0, 3)]
    assert len(store.names()) == 2


def flip(store, entry, file_name):
    path = f"{store._root}/{entry.name}/{file_name}"
    data = bytearray(store._fs.cat_file(path))
    data[-1] ^= 1
    store._fs.pipe_file(path, bytes(data))


def test_a_damaged_byte_is_found_and_an_older_entry_serves_where_that_is_asked_for(url, tmp_path):
    run = make_run(tmp_path / "run", url)
    mirror(run, 1)
    mirror(run, 2)
    store = Store(url)
    flip(store, line(store.entries()[0])[-1], "checkpoints/step_2/data")
    back = RunPaths(tmp_path / "back")
    back.staging.mkdir(parents=True)
    with pytest.raises(Damaged, match=r"step_2/data is damaged.*--ckpt.on-corrupt fallback restores step 1"):
        restore(back, 1, settings(back.root, url), continue_any)
    assert not back.attempts.exists()
    restore(back, 2, settings(back.root, url, on_corrupt="fallback"), continue_any)
    assert list(durable.committed(back.checkpoints)) == [1]


def test_a_damaged_manifest_is_not_believed(url, tmp_path):
    run = make_run(tmp_path / "run", url)
    mirror(run, 1)
    store = Store(url)
    flip(store, store.entries()[0][0], "MANIFEST.json")
    entries, (problem,) = store.entries()
    assert entries == []
    assert "MANIFEST.json" in problem


def test_what_a_rollback_left_behind_is_older_than_what_came_after_it(url, tmp_path):
    first = make_run(tmp_path / "first", url)
    for step in (1, 2, 3):
        mirror(first, step)
    second = make_run(tmp_path / "second", url, lineage=1)
    for step in (1, 2):
        mirror(second, step, data=b"other")
    assert steps(url) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    assert [(e.origin.lineage, e.step) for e in line(Store(url).entries()[0])] == [(1, 1), (1, 2)]
    retain(Store(url), first.config.ckpt)
    assert len(steps(url)) == 5  # without a rule everything stays
    retain(Store(url), second.config.ckpt.model_copy(update={"keep_last": 1, "mirror_keep_last": 2}))
    assert steps(url) == [(1, 1), (1, 2)]


def test_retention_follows_the_rules_of_the_run(url, tmp_path):
    run = make_run(tmp_path / "run", url, keep_last=2, keep_interval=3)
    for step in range(1, 8):
        mirror(run, step)
        retain(Store(url), run.config.ckpt)
    assert steps(url) == [(0, 3), (0, 6), (0, 7)]


def test_a_checkpoint_is_uploaded_once(url, tmp_path):
    run = make_run(tmp_path / "run", url)
    mirror(run, 1)
    send(Store(url), take(run, 1))
    assert len(Store(url).names()) == 1


def test_the_mirror_of_another_run_is_refused(url, tmp_path):
    mirror(make_run(tmp_path / "run", url), 1)
    with pytest.raises(Refusal, match="holds checkpoints of run abc, this is run xyz"):
        upload.check(url, "xyz")
    upload.check(url, "abc")
    with pytest.raises(Refusal, match=r"is not an address|needs a package"):
        upload.check("nosuch://x", "abc")


def test_damage_on_the_way_is_found_before_the_manifest(url, tmp_path):
    """The bytes that are read back are not those that the checkpoint's manifest names."""
    run = make_run(tmp_path / "run", url)
    save(run, 1)
    snapshot = take(run, 1)
    (snapshot.directory / "checkpoints" / "step_1" / "data").unlink()
    (snapshot.directory / "checkpoints" / "step_1" / "data").write_bytes(b"weightz1")
    with pytest.raises(Damaged, match="was written as xxh3"):
        send(Store(url), snapshot)
    assert steps(url) == []


def test_failures_are_counted_retried_and_never_stop_the_run(url, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "BACKOFF_S", 0.01)
    run = make_run(tmp_path / "run", url)
    save(run, 1)
    real, tries = Store.put, []

    def failing(self, *arguments):
        tries.append(arguments)
        if len(tries) <= 2:
            raise OSError("the network is down")
        real(self, *arguments)

    monkeypatch.setattr(Store, "put", failing)
    uploader = Uploader(run, url)
    uploader.offer(1)
    uploader.close()
    assert steps(url) == [(0, 1)]
    assert (uploader.take_failures(), uploader.take_failures()) == (2, 0)
    monkeypatch.setattr(Store, "put", lambda *a: (_ for _ in ()).throw(OSError("gone for good")))
    save(run, 2)
    uploader = Uploader(run, url)
    uploader.offer(2)
    uploader.close()  # it gives up
    assert 1 <= uploader.take_failures() <= upload.LAST_TRIES + 2
    assert steps(url) == [(0, 1)]
    assert not list(run.stage.directory.glob("*mirror*"))


def test_the_run_waits_for_the_newest_upload_alone_and_for_none_before_its_end(url, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", url)
    gate, real = threading.Event(), Store.put

    def slow(self, *arguments):
        gate.wait(20)
        real(self, *arguments)

    monkeypatch.setattr(Store, "put", slow)
    uploader = Uploader(run, url)
    started = time.monotonic()
    for step in (1, 2, 3):
        save(run, step)
        uploader.offer(step)
        shutil.rmtree(run.paths.checkpoint(step))  # as retention may
    assert time.monotonic() - started < 10
    threading.Timer(0.2, gate.set).start()
    uploader.close()
    assert steps(url) == [(0, 3)]


def test_a_manifest_that_names_files_outside_is_refused(url, tmp_path):
    run = make_run(tmp_path / "run", url)
    save(run, 1)
    snapshot, store = take(run, 1), Store(url)
    files = (msgspec.structs.replace(snapshot.manifest.files[0], name="../../evil"),)
    manifest = durable.signed(msgspec.structs.replace(snapshot.manifest, files=files))
    store._fs.makedirs(f"{store._root}/{snapshot.name}", exist_ok=True)
    store.commit(snapshot.name, manifest)
    assert "names a file outside itself" in store.entries()[1][0]
