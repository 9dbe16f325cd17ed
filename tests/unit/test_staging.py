"""The copy that an asynchronous save writes: nothing that happens afterwards shows in it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ratchet.trainer.staging import Staging


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_the_optimizer_does_next_does_not_show_in_the_copy():
    live = torch.tensor([1.0, 2.0])
    staged = Staging(torch.device("cpu")).copy({"model": {"w": live}})
    live += 10
    assert staged["model"]["w"].tolist() == [1.0, 2.0]


def test_the_next_copy_fills_the_same_buffers():
    staging, live = Staging(torch.device("cpu")), torch.tensor([1.0, 2.0])
    first = staging.copy({"model": {"w": live}, "optimizer": {"w": live * 3}})
    place = first["optimizer"]["w"].data_ptr()
    live += 10
    second = staging.copy({"model": {"w": live}, "optimizer": {"w": live * 3}})
    assert second["optimizer"]["w"].data_ptr() == place
    assert second["model"]["w"].tolist() == [11.0, 12.0]
    assert second["optimizer"]["w"].tolist() == [33.0, 36.0]


def test_a_shard_is_copied_as_a_shard_of_the_same_whole(mesh):
    whole = torch.arange(6.0).reshape(3, 2)
    live = DTensor.from_local(whole.clone(), mesh, [Shard(0)])
    staged = Staging(torch.device("cpu")).copy({"model": {"w": live}})["model"]["w"]
    live.to_local().zero_()
    assert isinstance(staged, DTensor)
    assert (staged.shape, staged.placements, staged.device_mesh) == (live.shape, live.placements, mesh)
    assert torch.equal(staged.to_local(), whole)
