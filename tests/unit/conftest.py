"""What several unit tests begin with."""

import pytest


@pytest.fixture(scope="module")
def world():
    """One rank, which talks to itself, with the kernels and the one thread of a real trainer."""
    import torch
    import torch.distributed as dist

    from ratchet.models.device import choose
    from ratchet.trainer.world import open_world, set_determinism

    threads = torch.get_num_threads()
    set_determinism(1)
    yield open_world(choose("cpu"))
    dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
