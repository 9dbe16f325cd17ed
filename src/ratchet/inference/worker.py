"""The engine's own thread: it alone touches the model; the server hands it work over a queue.

    server ── submit, cancel, pause, resume, call ──► queue ──► worker thread ── step ──► engine
    server ◄── on_finish, of all that a step finished at once; futures ── worker thread

Who waits for whom: the worker waits for the queue only when it has nothing to step. `pause` with mode `wait`
is answered when the engine has drained, the other modes after the step in progress.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Literal, TypeVar

import torch

from ratchet.errors import RatchetError
from ratchet.inference.engine import Engine, Sequence

Mode = Literal["keep", "wait", "abort"]
T = TypeVar("T")


class Interrupted(RatchetError):
    """What was waited for will not happen: the server was resumed, or is stopping."""


class Worker:
    """Runs an engine: freely, draining, or paused."""

    def __init__(
        self,
        engine: Engine,
        threads: int,
        on_crash: Callable[[BaseException], None],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        """`call_soon` calls a function in the server's thread: it waits for the step in progress to end once, for
        all sequences that the step finishes."""
        self.engine = engine
        self.is_paused = False
        self._threads = threads
        self._on_crash = on_crash
        self._call_soon = call_soon
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._held: list[Sequence] = []
        self._draining: list[Future[None]] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_draining(self) -> bool:
        return bool(self._draining)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self.engine.waiting) + len(self._held)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress; what is in flight is left unanswered."""
        self._commands.put(self._stop)
        self._thread.join()

    def submit(self, sequences: list[Sequence]) -> None:
        """While paused or draining they are held back until `resume`."""
        if sequences:
            self._commands.put(lambda: self._submit(sequences))

    def cancel(self, sequences: list[Sequence]) -> None:
        if sequences:
            self._commands.put(lambda: self._cancel(sequences))

    def pause(self, mode: Mode) -> "Future[None]":
        """Freeze (`keep`), drain (`wait`) or finish everything as it is (`abort`). Pausing twice is fine."""
        done: Future[None] = Future()
        self._commands.put(lambda: self._pause(mode, done))
        return done

    def resume(self) -> "Future[None]":
        return self.call(self._resume)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function in the engine's thread, between two steps."""
        done: Future[T] = Future()

        def command() -> None:
            try:
                done.set_result(function())
            except RatchetError as error:
                done.set_exception(error)

        self._commands.put(command)
        return done

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while not self._is_stopping:
                self._obey()
                if self.engine.has_work and not self.is_paused and not self._is_stopping:
                    self._tell(self.engine.step())
                self._settle()
        except BaseException as error:
            self._on_crash(error)
            raise

    def _obey(self) -> None:
        """Carry out every command that has arrived; sleep until one does if there is nothing to step."""
        if self.is_paused or not self.engine.has_work:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _settle(self) -> None:
        """A drained engine is a paused one."""
        if self._draining and not self.engine.has_work:
            self._freeze()

    def _freeze(self) -> None:
        self.is_paused = True
        for done in self._draining:
            done.set_result(None)
        self._draining.clear()

    def _tell(self, finished: list[Sequence]) -> None:
        if finished:
            self._call_soon(partial(_finish, finished))

    def _submit(self, sequences: list[Sequence]) -> None:
        if self.is_paused or self._draining:
            self._held += sequences
        else:
            for sequence in sequences:
                self.engine.submit(sequence)

    def _cancel(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._held:
                self._held.remove(sequence)
            self.engine.cancel(sequence)

    def _pause(self, mode: Mode, done: "Future[None]") -> None:
        self._draining.append(done)
        if mode == "abort":
            self._tell(self.engine.abort())
        if mode == "wait" and self.engine.has_work:
            self.is_paused = False  # sequences frozen by `keep` before are drained now
        else:
            self._freeze()

    def _resume(self) -> None:
        self.is_paused = False
        for done in self._draining:
            done.set_exception(Interrupted("The server was resumed before it had drained."))
        self._draining.clear()
        for sequence in self._held:
            self.engine.submit(sequence)
        self._held.clear()

    def _stop(self) -> None:
        self._is_stopping = True
        for done in self._draining:
            done.set_exception(Interrupted("The server is stopping."))
        self._draining.clear()


def _finish(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        sequence.on_finish(sequence)
