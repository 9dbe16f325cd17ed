"""What surrounds the heavy imports of a program."""

import functools
import gc
import os
import platform
import subprocess
import sys

import pytest

from ratchet import attempts, process
from ratchet.paths import RunPaths


def double(number):
    return 2 * number


def of(module):
    """A function that says that it is of a module."""
    copied = functools.partial(double)
    copied.__module__ = module
    return copied


def size(cached):
    return cached.cache_info().maxsize


@pytest.fixture
def thawed():
    """What this process's imports have kept from the collector is given back to it: hypothesis asks it who refers to
    whom."""
    yield
    gc.unfreeze()


def test_caches_of_transformers_without_a_size_hold_everything_while_it_is_imported(thawed):
    with process.imports():
        bare = functools.lru_cache(of("transformers.utils"))
        assert bare(3) == bare(3) == 6
        assert bare.cache_info()[:3] == (1, 1, None)
        assert size(functools.lru_cache(maxsize=2)(of("transformers.utils"))) == 2
        assert size(functools.lru_cache(2)(of("transformers.utils"))) == 2
        assert size(functools.lru_cache()(of("transformers.utils"))) == 128
        assert size(functools.lru_cache(of("torch.utils"))) == 128
        late = functools.lru_cache
    assert size(functools.lru_cache(of("transformers.utils"))) == 128
    typed = late(None, typed=True)(of("torch.utils"))
    assert (typed(1), typed(1.0)) == (2, 2)
    assert typed.cache_info().misses == 2


def test_an_import_that_fails_leaves_caches_and_collector_as_they_were():
    code = """
import functools, gc
from ratchet import process
before = functools.lru_cache
try:
    with process.imports():
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    assert gc.isenabled()
    assert functools.lru_cache is before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_files_of_transformers_models_are_read_once():
    code = """
import sys
from ratchet import process
read = []
sys.addaudithook(lambda event, its: event == "open" and str(its[0]).endswith("/modeling_qwen3.py") and read.append(its))
with process.imports():
    import transformers.models
assert len(read) == 1, len(read)
assert "Qwen3ForCausalLM" in dir(transformers)
assert transformers.models.qwen3.Qwen3Config().model_type == "qwen3"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packages_that_nothing_here_calls_are_not_imported_and_can_be_afterwards(tmp_path):
    (tmp_path / "accelerate.py").touch()
    code = """
import sys
from ratchet import process
with process.imports():
    import ratchet.inference.serving, ratchet.trainer.loop
    try:
        import accelerate
    except ImportError:
        pass
    else:
        raise AssertionError
assert not {"accelerate", "trio"} & sys.modules.keys()
import accelerate
with process.imports():
    assert sys.modules["accelerate"] is accelerate
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})


def test_the_reason_of_a_wrapped_error_is_the_operating_systems():
    class Wrapped(Exception):
        failures = {0: (OSError(28, "No space left on device", "/run/x"), "a stack of frames")}

    assert process.why(Wrapped("many lines\nof frames")) == "No space left on device: /run/x"
    assert process.why(ValueError("one\ntwo")) == "ValueError: one"


def test_a_launcher_that_is_not_there_any_more_is_known_by_its_number(tmp_path):
    paths = RunPaths(tmp_path)
    assert not attempts.is_gone(paths)
    lock = attempts.Lock(paths)
    lock.acquire()
    assert not attempts.is_gone(paths)
    lock.release()
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    paths.lock.write_text(f"pid {ended.stdout.strip()} on {platform.node()}\n")
    assert attempts.is_gone(paths)
    paths.lock.write_text(f"pid {ended.stdout.strip()} on another-machine\n")
    assert not attempts.is_gone(paths)
