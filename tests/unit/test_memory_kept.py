"""Programs that compute keep the memory that a step frees: a child of theirs takes each page once."""

import subprocess
import sys

from ratchet.launch.early import child_environment

STEPS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    places = [libc.malloc(8 << 20) for _ in range(4)]
    for place in places:
        ctypes.memset(place, 1, 8 << 20)
    for place in places:
        libc.free(place)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults():
    environment = child_environment(1, keeps_memory=True)
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, check=True)
    return int(done.stdout)


def test_what_a_step_frees_the_next_one_does_not_fault_in_again(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert faults() < 100
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1048576")
    assert faults() > 1000, "what the user says counts"
