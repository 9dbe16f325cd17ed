"""The engine's thread: pause, resume and failure, without a model."""

import threading

import pytest

from ratchet.inference.worker import Interrupted, Worker


class Sequence:
    """Something that takes `steps` steps."""

    def __init__(self, steps):
        self.left = steps
        self.ended = threading.Event()
        self.reason = None

    def on_finish(self, sequence):
        assert sequence is self
        self.ended.set()


class Engine:
    """As much of an engine as a worker sees; `gate` lets one step through at a time."""

    def __init__(self):
        self.waiting = []
        self.gate = threading.Semaphore(0)
        self.fails = False

    @property
    def has_work(self):
        return bool(self.waiting)

    def submit(self, sequence):
        self.waiting.append(sequence)

    def cancel(self, sequence):
        self.waiting = [other for other in self.waiting if other is not sequence]

    def abort(self):
        aborted, self.waiting = self.waiting, []
        for sequence in aborted:
            sequence.reason = "abort"
        return aborted

    def step(self):
        if self.fails:
            raise ValueError("broken")
        assert self.gate.acquire(timeout=10)
        for sequence in self.waiting:
            sequence.left -= 1
        finished = [sequence for sequence in self.waiting if sequence.left == 0]
        self.waiting = [sequence for sequence in self.waiting if sequence.left]
        for sequence in finished:
            sequence.reason = "done"
        return finished


@pytest.fixture
def crashes():
    return []


@pytest.fixture
def calls():
    """What was called in the server's thread, one entry a call."""
    return []


@pytest.fixture
def worker(crashes, calls):
    def call_soon(function):
        calls.append(function)
        function()

    worker = Worker(Engine(), 1, crashes.append, call_soon)
    worker.start()
    yield worker
    if not crashes:
        worker.engine.gate.release(1000)
        worker.stop()


def test_keep_freezes_and_resume_continues(worker):
    sequence = Sequence(2)
    worker.submit([sequence])
    frozen = worker.pause("keep")
    worker.engine.gate.release()
    frozen.result(10)
    assert worker.is_paused
    worker.engine.gate.release(5)
    worker.resume().result(10)
    assert sequence.ended.wait(10)


def test_wait_drains_and_holds_back_newcomers(worker):
    first, later = Sequence(2), Sequence(1)
    worker.submit([first])
    paused = worker.pause("wait")
    worker.submit([later])
    worker.engine.gate.release(2)
    paused.result(10)
    assert (first.reason, later.reason, worker.waiting) == ("done", None, 1)
    worker.engine.gate.release()
    worker.resume().result(10)
    assert later.ended.wait(10)


def test_pausing_again_takes_over_a_drain(worker):
    sequence = Sequence(5)
    worker.submit([sequence])
    draining = worker.pause("wait")
    frozen = worker.pause("keep")
    worker.engine.gate.release()
    frozen.result(10)
    draining.result(10)
    assert worker.is_paused
    assert sequence.left >= 4


def test_resume_ends_a_drain_with_an_error(worker):
    worker.submit([Sequence(5)])
    draining = worker.pause("wait")
    resumed = worker.resume()
    worker.engine.gate.release(2)
    resumed.result(10)
    with pytest.raises(Interrupted, match="resumed"):
        draining.result(10)
    assert not worker.is_paused


def test_wait_after_keep_drains_what_was_frozen(worker):
    sequence = Sequence(2)
    worker.submit([sequence])
    frozen = worker.pause("keep")
    worker.engine.gate.release()
    frozen.result(10)
    worker.engine.gate.release(5)
    worker.pause("wait").result(10)
    assert (sequence.reason, worker.is_paused) == ("done", True)


def test_abort_ends_everything_and_pauses(worker):
    sequence = Sequence(5)
    worker.submit([sequence])
    aborted = worker.pause("abort")
    worker.engine.gate.release()
    aborted.result(10)
    assert (sequence.reason, worker.is_paused) == ("abort", True)


def test_what_one_step_finishes_is_told_by_one_call(worker, calls):
    short, long = [Sequence(1) for _ in range(3)], Sequence(2)
    worker.submit([*short, long])
    worker.engine.gate.release()
    assert all(sequence.ended.wait(10) for sequence in short)
    assert (len(calls), long.ended.is_set()) == (1, False)
    worker.engine.gate.release()
    assert long.ended.wait(10)
    assert len(calls) == 2


def test_a_paused_worker_still_obeys(worker):
    worker.pause("keep").result(10)
    held = Sequence(1)
    worker.submit([held])
    assert worker.call(lambda: worker.waiting).result(10) == 1
    worker.cancel([held])
    assert worker.call(lambda: worker.waiting).result(10) == 0


def test_a_refusal_inside_a_call_reaches_the_caller(worker):
    def refuse():
        raise Interrupted("no")

    with pytest.raises(Interrupted, match="no"):
        worker.call(refuse).result(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_is_reported_and_ends_the_thread(worker, crashes):
    worker.engine.fails = True
    worker.submit([Sequence(1)])
    worker._thread.join(10)
    assert [repr(error) for error in crashes] == ["ValueError('broken')"]
