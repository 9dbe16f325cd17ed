"""A program that is forked from a nursery, beside the same program as a process of its own."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from programs import wait_until
from ratchet.errors import EXIT_STOPPED
from ratchet.launch import early
from ratchet.launch.births import Nursery
from ratchet.launch.early import MODULES, child_environment
from ratchet.launch.program import _start_alone
from ratchet.nursery import Order

PROGRAM = """
import json, os, socket, sys, time
from ratchet import process

process.die_with_parent()
what, fd = sys.argv[1:3]
facts = {
    "argv": sys.argv[1:],
    "name": __name__,
    "package": __package__,
    "greeting": os.environ.get("GREETING"),
    "has_strangers": "STRANGER" in os.environ,
    "threads": os.environ["OMP_NUM_THREADS"],
    "parent": os.getppid(),
    "leads": os.getsid(0) == os.getpgrp() == os.getpid(),
    "stdin": os.readlink("/proc/self/fd/0"),
    "port": socket.socket(fileno=int(fd)).getsockname()[1],
    "line": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[1:],
    "path": sys.path[0],
    "has_collector": __import__("gc").isenabled(),
    "has_asked": "asked" in sys.modules,
}
print(json.dumps(facts))
while what == "wait":
    time.sleep(0.01)
sys.exit(int(what))
"""


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a program in it, and a module that takes its time to be imported."""
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "told" / "__init__.py").touch()
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def open_nursery(module):
    """One that imports a module, for trainers."""
    return Nursery(["trainer"], early.begin([module], ["run"]))


def order(place, listener, what, log="log", **environment):
    fd = listener.fileno()
    variables = child_environment(threads=3) | environment
    return Order("told", [what, str(fd)], variables, str(place / log), [fd])


@pytest.fixture
def born(place, listener, monkeypatch):
    """Starts programs from a nursery."""
    monkeypatch.setenv("STRANGER", "of the nursery's environment alone")
    nursery = open_nursery("json")
    monkeypatch.delenv("STRANGER")

    def start(what, **environment):
        wanted = order(place, listener, what, **environment)
        return nursery.start(wanted, lambda: pytest.fail("the nursery is there"))

    yield start
    nursery.close()


def children_of_this_process():
    """Their command lines, one after the other."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                lines.append((entry / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return " ".join(lines)


def log(place, name="log"):
    path = place / name
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), timeout_s=20)
    return path.read_text()


def test_what_is_forked_sees_what_a_process_of_its_own_sees(place, listener, born):
    assert born("0", GREETING="hello").wait(20) == 0
    assert _start_alone(order(place, listener, "0", "alone", GREETING="hello")).wait(20) == 0
    forked, alone = (json.loads((place / name).read_text()) for name in ("log", "alone"))
    assert forked == alone
    assert forked["greeting"] == "hello"
    assert forked["parent"] == os.getpid()
    assert forked["port"] == listener.getsockname()[1]
    assert forked["line"] == ["-m", "told", "0", str(listener.fileno())]


def test_after_a_look_for_a_gpu_a_program_is_a_fresh_interpreter(place, listener):
    """As torch has it: a fork of a process that has asked CUDA for its devices cannot use them."""
    (place / "asked.py").write_text("""
import os, sys, types

torch = types.ModuleType("torch")
first = os.getpid()
torch.cuda = types.SimpleNamespace(_is_in_bad_fork=lambda: os.getpid() != first)
sys.modules["torch"] = torch
""")
    nursery = open_nursery("asked")
    program = nursery.start(order(place, listener, "0"), lambda: pytest.fail("the nursery is there"))
    assert program.wait(20) == 0
    assert _start_alone(order(place, listener, "0", "alone")).wait(20) == 0
    found, alone = (json.loads((place / name).read_text()) for name in ("log", "alone"))
    assert found == alone
    assert not found["has_asked"]
    nursery.close()


def test_a_launcher_that_rests_hears_of_a_birth_at_once(place, listener):
    """By the end of this rest the test would have failed."""
    nursery = open_nursery("json")
    program = nursery.start(order(place, listener, "0"), lambda: pytest.fail("the nursery is there"))
    nursery.rest(100_000)
    log(place)
    assert program.wait(20) == 0
    nursery.rest(0.001)  # though nobody is awaited
    nursery.close()


def test_a_launcher_that_rests_hears_of_a_nursery_that_died(place, listener):
    nursery, otherwise = open_nursery("slow"), []
    wanted = order(place, listener, "0")
    nursery.start(wanted, lambda: otherwise.append(_start_alone(wanted)) or otherwise[0])
    nursery.give_up()
    nursery.rest(100_000)
    assert otherwise[0].wait(20) == 0
    nursery.close()


def test_how_a_program_ended_is_told(place, born):
    assert born("7").wait(20) == 7
    program = born("wait")
    log(place)
    assert program.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.05)
    program.send_signal(signal.SIGKILL)
    assert program.wait(20) == -signal.SIGKILL
    program.send_signal(signal.SIGKILL)  # whose number may be another process's by now


def test_an_error_of_a_program_is_in_its_log(place, born):
    assert born("no number").wait(20) == 1
    assert "ValueError" in (place / "log").read_text()


def test_a_program_outlives_its_nursery_and_dies_with_its_launcher(place, listener):
    fd = listener.fileno()
    code = f"""
import time
from pathlib import Path
from ratchet.launch import early
from ratchet.launch.births import Nursery
from ratchet.launch.early import child_environment
from ratchet.nursery import Order
nursery = Nursery(["trainer"], early.begin(["json"], ["run"]))
order = Order("told", ["wait", "{fd}"], child_environment(1), {str(place / "log")!r}, [{fd}])
program = nursery.start(order, None)
while program.poll() is None and not program._pid:
    time.sleep(0.01)
nursery.close()
print(program._pid, flush=True)
time.sleep(60)
"""
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, pass_fds=[fd]
    )
    pid = int(launcher.stdout.readline())
    log(place)
    assert "told" in Path(f"/proc/{pid}/cmdline").read_text()
    launcher.kill()
    launcher.communicate()
    wait_until(
        lambda: not Path(f"/proc/{pid}").exists() or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()
    )


def test_without_a_nursery_programs_are_started_otherwise(place, listener):
    nursery = open_nursery("slow")
    wanted = order(place, listener, "wait")
    awaited = nursery.start(wanted, functools.partial(_start_alone, wanted))
    assert awaited.poll() is None
    nursery.give_up()
    late = nursery.start(wanted, functools.partial(_start_alone, wanted))
    assert awaited.poll() is None
    wait_until(lambda: (place / "log").exists() and (place / "log").read_text().count("\n") == 2)
    for program in (awaited, late):
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == -signal.SIGTERM
    nursery.close()


def test_a_nursery_whose_imports_left_a_thread_forks_nothing(place, listener):
    (place / "busy.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()"
    )
    nursery = open_nursery("busy")
    wanted, otherwise = order(place, listener, "0"), []

    def start():
        otherwise.append(_start_alone(wanted))
        return otherwise[0]

    assert nursery.start(wanted, start).wait(20) == 0
    assert otherwise
    nursery.close()


def test_what_is_asked_to_end_before_it_was_born_never_runs(place, listener):
    nursery = open_nursery("slow")
    asked, other = (
        nursery.start(order(place, listener, "wait", name), lambda: pytest.fail("the nursery is there"))
        for name in ("asked", "other")
    )
    asked.send_signal(signal.SIGTERM)
    assert asked.poll() == EXIT_STOPPED
    wait_until(lambda: other.poll() is None and (place / "other").exists())
    log(place, "other")  # both were born by now
    other.send_signal(signal.SIGTERM)
    assert other.wait(20) == -signal.SIGTERM
    nursery.close()
    assert "told" not in children_of_this_process()


def test_one_of_which_nobody_hears_does_nothing(place, listener):
    """The nursery is killed between the birth and the word of it: another program takes its place."""
    nursery = open_nursery("json")
    wanted = order(place, listener, "0", "silent")
    gate, leave = os.pipe()
    nursery._link.setblocking(True)
    socket.send_fds(nursery._link, [msgspec.json.encode(wanted)], [*wanted.fds, gate])
    pid = int(nursery._link.recv(32))
    nursery.give_up()
    os.close(gate)
    os.close(leave)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_STOPPED
    assert not (place / "silent").exists()
    nursery.close()


def test_one_that_is_killed_while_it_is_awaited_takes_the_nursery_with_it(place, listener):
    """It may have been awaited for too long, and what takes its place must not wait as well."""
    nursery = open_nursery("slow")
    first = nursery.start(order(place, listener, "0", "first"), lambda: pytest.fail("it was killed"))
    first.send_signal(signal.SIGKILL)
    assert first.poll() == -signal.SIGKILL
    wanted = order(place, listener, "0", "second")
    assert nursery.start(wanted, functools.partial(_start_alone, wanted)).wait(20) == 0
    nursery.close()
    assert not (place / "first").exists()


def test_what_a_nursery_imports_starts_no_thread_and_looks_for_no_gpu():
    code = f"""
import importlib, os, torch

def looked(*arguments):
    raise AssertionError("a process that has looked for a GPU cannot fork one that uses it")

for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, looked)
torch._C._cuda_getDeviceCount = looked
for name in {list(MODULES.values())!r}:
    importlib.import_module(name)
assert len(os.listdir("/proc/self/task")) == 1
"""
    subprocess.run([sys.executable, "-c", code], env=child_environment(threads=1), check=True)
