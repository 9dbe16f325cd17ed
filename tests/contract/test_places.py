"""A policy reaches a server by memory or by the disk: servers that see both, one of them, or neither."""

import pytest
from orchestrated import STEPS, Run, complete, parts, settings

from ratchet import digest, durable
from ratchet.paths import RunPaths

BY_MEMORY = {"transport": "memory", "publish_interval": 3}


NEEDED = [0, 1, 2, 4]
"""Policy 3 samples no batch and is not evaluated."""


def steps_given(server):
    """The policies that it was given, each with the place that it took it from."""
    return [("shm" if "/dev/shm" in path else "disk", path.rpartition("_")[2]) for path, _ in server.given]


async def test_a_server_beside_the_trainer_is_given_each_policy_from_memory(here, server):
    run = await complete(settings(here / "run", deterministic=True, weights=BY_MEMORY), server)
    assert all(was_there for _, was_there in server.given)
    assert {place for place, _ in steps_given(server)} == {"shm"}
    assert [int(step) for _, step in steps_given(server)] == NEEDED
    calm = await complete(settings(here / "calm", deterministic=True), server)
    assert digest.result(run.paths.root) == digest.result(calm.paths.root)
    assert {place for place, _ in steps_given(server)[len(NEEDED) :]} == {"disk"}


async def test_nothing_is_left_in_memory_when_the_attempt_is_closed(here, server):
    run = await complete(settings(here / "run", weights=BY_MEMORY), server)
    assert not run.memory.paths.root.parent.exists()


@pytest.mark.parametrize("deterministic", [True, False])
async def test_a_server_on_another_machine_waits_for_the_copy_on_the_disk(here, server, deterministic):
    server.unseen = "/dev/shm"
    config = settings(here / "run", deterministic=deterministic, weights={"transport": "memory"})
    run = Run(config, server.url)
    run.copy_delay_s = 0.3
    await run.start()
    said = await run.finish()
    await run.close(0)
    assert said.count("is on another machine: it gets policies by the disk") == 1
    assert {place for place, _ in steps_given(server)} == {"disk"}
    assert int(steps_given(server)[-1][1]) == STEPS
    assert len(parts(run)) > STEPS


async def test_a_server_that_never_sees_all_policies_is_refused_with_the_remedy(here, server):
    server.unseen = "/dev/shm"
    # Exact, so that no policy is passed over: policy 1 is in memory only.
    run = Run(settings(here / "run", deterministic=True, weights=BY_MEMORY), server.url)
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 2
    assert "does not see" in said
    assert "set weights.publish_interval = 1" in said


async def test_a_server_that_knows_one_path_takes_that_on_the_disk_where_there_is_one(here, server):
    server.knows_paths = False
    run = await complete(settings(here / "run", deterministic=True, weights=BY_MEMORY), server)
    places = dict(reversed(step) for step in steps_given(server))
    assert places["1"] == "shm", "policy 1 is nowhere else"
    assert set(places) == {str(step) for step in NEEDED}
    assert len(parts(run)) > STEPS


async def test_an_orchestrator_that_does_not_see_the_memory_is_refused_unless_all_comes_onto_the_disk(
    here, server
):
    config = settings(here / "run", weights=BY_MEMORY)
    run = Run(config, server.url)
    run.memory.paths.root.rename(run.memory.paths.root.with_name("elsewhere"))
    run.unpublished = set(range(STEPS + 1))
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 2
    assert "start it there, or set weights.publish_interval = 1" in said


async def test_after_the_death_of_all_the_policies_are_made_again(here, server):
    """The memory goes with the attempt; what the disk has and what comes again is enough to end the same."""
    config = settings(here / "run", deterministic=True, weights=BY_MEMORY)
    run = Run(config, server.url)
    await run.start()
    await run.batch(2)
    run.process.kill()
    await run.process.wait()
    await run.close()
    assert 1 not in durable.steps(run.paths.weights)
    again = await complete(config, server)
    calm = await complete(settings(here / "calm", deterministic=True), server)
    assert digest.result(again.paths.root) == digest.result(calm.paths.root)
    assert RunPaths(here / "run").weight(STEPS).exists()
