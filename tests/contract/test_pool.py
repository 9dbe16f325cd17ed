"""Several servers as one: which of them answers, dies, freezes or changes its weights is nobody else's concern."""

import asyncio
import itertools
import socket

import pytest
from fake_inference import FakeInference
from orchestrated import STEPS, Run, check_sample, complete, parts, settings

from ratchet import batchlog

CLIENT = {"wait_s": 5, "timeout_s": 30}
WATCHFUL = {"client": CLIENT | {"liveness_s": 0.5}}


@pytest.fixture
async def servers():
    found = [FakeInference() for _ in range(3)]
    for server in found:
        await server.start()
    yield found
    for server in found:
        server.thaw()
        await server.stop()


def exact(root, **more):
    orchestrator = {"client": CLIENT} | more.pop("orchestrator", {})
    return settings(root, deterministic=True, orchestrator=orchestrator, **more)


def loose(root, **more):
    orchestrator = {"client": CLIENT, "eval": None} | more.pop("orchestrator", {})
    return settings(root, orchestrator=orchestrator, max_async_level=2, **more)


def check_draws(run, steps=STEPS):
    """Every draw was trained once, as one group of four."""
    trained = [sample.draw for step in range(steps) for sample in run.samples(step)]
    assert sorted(trained) == sorted(4 * list(range(steps * 3)))


def step_of(version):
    return int(version.split("/")[2])


def faults(run, name):
    return sum(row.get(f"fault/{name}", 0) for row in run.rows("orchestrator"))


async def test_the_run_is_the_same_whichever_server_plays_a_rollout(here, servers, reference):
    for count, server in enumerate(servers):
        server.tear_every, server.abort_every, server.delay_s = 7 + count, 11, 0.004
    servers[1].restart_at = {4, 13, 22}
    run = await complete(exact(here / "run"), *servers)
    assert parts(run) == reference
    assert all(server.generated > 5 for server in servers)
    assert faults(run, "reconciled") > 0
    assert faults(run, "torn/answer") > 0
    row = run.rows("orchestrator")[-1]
    assert all(f"perf/server_{index}/tokens_per_s" in row for index in range(3))


async def test_one_http_request_each_makes_the_same_run(here, servers, reference):
    """As with a plain vLLM; the third server has a lane."""
    for server in servers[:2]:
        del server.facts["lane"]
        server.tear_every, server.delay_s = 9, 0.004
    run = await complete(exact(here / "run"), *servers)
    assert parts(run) == reference
    assert [server.asked_alone > 5 for server in servers] == [True, True, False]
    assert servers[2].generated > 5


async def test_the_rollouts_of_a_group_prefer_one_server(here, servers):
    await complete(exact(here / "run", orchestrator={"eval": None}), *servers)
    # Batch 0 may begin before all servers have joined. In each later one every server is home to one of the groups;
    # batches 2 and 3 are those of policies 1 and 2.
    for policy in (1, 2):
        homes = [
            {
                prompt
                for prompt, versions in server.served_by_prompt.items()
                if policy in map(step_of, versions)
            }
            for server in servers
        ]
        assert [len(prompts) for prompts in homes] == [1, 1, 1]


@pytest.mark.parametrize("deterministic", [True, False])
async def test_a_frozen_server_does_not_hold_up_the_run(here, servers, reference, deterministic):
    for server in servers:
        server.delay_s = 0.1
    # Two requests at a server at a time, so that all are at work until the end.
    config = (exact if deterministic else loose)(here / "run", orchestrator=WATCHFUL, inference={"slots": 1})
    run = Run(config, *(server.url for server in servers))
    await run.start()
    async with asyncio.timeout(20):
        while not servers[2].open:
            await asyncio.sleep(0.002)
    servers[2].freeze()
    said = await run.finish()
    await run.close(0)
    assert f"{servers[2].url} does not answer" in said
    assert faults(run, "servers_silent") >= 1
    assert faults(run, "failovers") == faults(run, "torn/silent") > 0
    check_draws(run)
    if deterministic:
        assert parts(run) == reference


async def test_a_server_that_was_away_is_given_the_newest_weights_before_it_is_used(here, servers):
    for server in servers:
        server.delay_s = 0.04
    steps = 24
    run = Run(
        loose(here / "run", max_off_policy_steps=2, max_steps=steps), *(server.url for server in servers)
    )
    run.prunes = True
    await run.start()
    await run.batch(0)
    servers[0].freeze()
    held = step_of(servers[0].version)
    async with asyncio.timeout(20):
        while run.paths.weight(held).exists():
            await asyncio.sleep(0.002)
    servers[0].thaw()
    said = await run.finish()
    await run.close(0)
    assert f"{servers[0].url} answers again" in said
    check_draws(run, steps)
    for step in range(steps):
        assert all(step - 2 <= sample.oldest_policy <= step for sample in run.samples(step))
    given = [int(path.rpartition("_")[2]) for path, _ in servers[0].given]
    assert max(given) > held
    assert given == sorted(given)
    assert all(was_there for server in servers for _, was_there in server.given)
    # Of what it was asked before it froze it may answer a rest, to nobody; then it plays for the new weights.
    assert any(step_of(v) > held for versions in servers[0].served_by_prompt.values() for v in versions)


async def test_weights_change_at_one_server_at_a_time_while_the_others_answer(here, servers):
    for server in servers:
        server.delay_s, server.update_delay_s = 0.25, 0.15
    # A slot is two requests: so few are answered at a time that new weights always meet rollouts in flight.
    run = await complete(loose(here / "run", inference={"slots": 1}), *servers)
    check_draws(run)
    # The first is how a server joined, one that has not ended was begun with the run's end.
    updates = [span for server in servers for span in server.pauses[1:] if len(span) == 3]
    busy = sorted(span for span in updates if span[1] > 0)
    assert len(busy) >= 2
    assert all(earlier[2] <= later[0] for earlier, later in itertools.pairwise(busy))
    answers = [at for server in servers for at in server.answered_at]
    assert any(begin < at < end for at in answers for begin, _, end in busy)
    for server in servers:
        steps = [step_of(name) for name in server.updates]
        assert steps == sorted(set(steps))


async def test_in_deterministic_mode_all_change_before_the_next_rollout_starts(here, servers):
    for count, server in enumerate(servers):
        server.update_delay_s = 0.1 * count
        server.delay_s = 0.2  # so that the slowest has joined before the run is over
    run = await complete(exact(here / "run", orchestrator={"eval": None}), *servers)
    for step in range(STEPS):
        for sample in run.samples(step):
            check_sample(sample, policy=max(0, step - 1))
    # The slowest begins with the fastest, and nobody answers until it is done. The run may end inside the last one.
    update = sum(len(pause) == 3 for pause in servers[2].pauses) - 1
    assert update >= 1
    (begin, _, end), fastest = servers[2].pauses[update], servers[0].pauses[update]
    assert begin < fastest[2]
    assert not any(begin < at < end for server in servers for at in server.answered_at)


async def test_a_server_that_cannot_take_new_weights_is_left_out_with_what_it_was_playing(here, servers):
    for server in servers:
        server.delay_s = 0.1  # long enough for the others to change their weights after it failed
    servers[0].script = {"/update_weights": [500] * 99}
    servers[0].script["/update_weights"].insert(0, 200)  # it joins, and never changes
    client = {"client": CLIENT | {"retries": 3}}
    run = await complete(loose(here / "run", orchestrator=client, inference={"slots": 1}), *servers)
    check_draws(run)
    assert faults(run, "servers_given_up") == 1
    assert [step_of(name) for name in servers[0].updates] == [0]
    assert max(step_of(name) for name in servers[1].updates) == STEPS - 1


async def test_the_oldest_policy_that_a_server_holds_is_kept(here, servers):
    servers[1].update_delay_s = 0.4
    run = Run(loose(here / "run"), *(server.url for server in servers))
    run.prunes = True
    await run.start()
    await run.finish()
    await run.close(0)
    assert all(was_there for server in servers for _, was_there in server.given)
    meta = [batchlog.read(run.paths, step)[1].meta["oldest_served"] for step in range(STEPS)]
    assert meta == sorted(meta)


async def test_one_server_that_is_never_there_is_left_out_and_none_is_refused(here, server):
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    run = Run(loose(here / "run"), nobody, server.url)
    await run.start()
    await run.finish()
    await run.close(0)
    check_draws(run)
    alone = settings(here / "none", orchestrator={"client": CLIENT | {"wait_s": 0.3}})
    run = Run(alone, nobody, nobody + "/v2")
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 2
    assert f"nobody answers at {nobody}, {nobody}/v2 after 0.3 s" in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_model_len": 64}, "Two servers have different settings (max_model_len"),
        ({"facts": {"slots": 32, "batch_invariant": True}}, "Two servers have different settings (slots"),
        ({"facts": {"slots": 16, "batch_invariant": False}}, "depend on what is sampled beside them"),
    ],
)
async def test_servers_on_whose_choice_a_result_would_depend_are_refused(here, servers, change, sentence):
    for name, value in change.items():
        setattr(servers[0], name, value)
    run = Run(exact(here / "run"), *(server.url for server in servers))
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 2
    assert sentence in said
