"""What the tests of a worker share: one process that forks the toy, and the calm course of each phase."""

import phases
import pytest
from runs import Toys


@pytest.fixture(scope="session")
def toys():
    toys = Toys()
    yield toys
    toys.close()


@pytest.fixture(scope="session")
def calm(toys, tmp_path_factory):
    """The calm course of a phase, by its name; each is gone through once."""
    known = {}

    def calm(phase, more=()):
        if (phase, more) not in known:
            start = tmp_path_factory.mktemp(phase)
            whole = start.with_name(f"{start.name}_whole")
            known[phase, more] = phases.calm(toys, phase, start, whole, more)
        return known[phase, more]

    return calm
