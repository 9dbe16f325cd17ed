"""Which of several directories a server takes a policy from."""

import pytest

from ratchet import durable
from ratchet.errors import Damaged
from ratchet.inference import adoption
from ratchet.inference.adoption import Wanted


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A directory in memory and one on the disk; those that are named `damaged` are."""

    def read(directory, network, digest):
        if directory.name.startswith("damaged"):
            raise Damaged(f"{directory.name} is damaged")
        return {}

    monkeypatch.setattr(adoption, "read", read)

    def make(*names):
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / durable.MANIFEST).touch()
        return Wanted(tuple(str(tmp_path / name) for name in names), "d", is_choice=True)

    return make


@pytest.mark.parametrize(
    ("names", "taken"), [(("memory", "disk"), "memory"), (("damaged_memory", "disk"), "disk")]
)
def test_the_first_sound_directory_is_taken(places, names, taken):
    assert places(*names).read("network")[0].name == taken


def test_where_none_is_sound_the_last_one_is_named(places):
    with pytest.raises(Damaged, match="damaged_disk"):
        places("damaged_memory", "damaged_disk").read("network")
