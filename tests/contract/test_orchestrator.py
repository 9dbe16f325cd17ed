"""The orchestrator as a real process, between a server that speaks the protocol and a trainer of one hash."""

import asyncio
import contextlib
import json
import shutil
import signal
import socket

import msgspec
import pytest
from fake_inference import FakeInference
from orchestrated import STEPS, Run, check_sample, complete, parts, settings

from ratchet import attempts, batchlog, durable, journal
from ratchet.launch.restarts import FINAL
from ratchet.stage import Stage


async def test_a_run_emits_its_batches_and_plays_its_evaluations(here, server):
    run = await complete(settings(here / "run", deterministic=True), server)
    for step in range(STEPS):
        samples = run.samples(step)
        assert [(s.draw, s.rollout) for s in samples] == [
            (draw, rollout) for draw in range(3 * step, 3 * step + 3) for rollout in range(4)
        ]
        for sample in samples:
            check_sample(sample, policy=max(0, step - 1))
        for start in range(0, 12, 4):
            assert sum(s.advantage for s in samples[start : start + 4]) == pytest.approx(0, abs=1e-9)
    assert [row["step"] for row in run.rows("orchestrator")] == [1, 2, 3, 4]
    assert [row["step"] for row in run.rows("evals")] == [0, 2, 4]
    assert run.rows("orchestrator")[-1]["progress/total_problems"] == 12
    assert all("eval/reverse_text/reward" in row for row in run.rows("evals"))
    played = json.loads((run.paths.eval(2) / "reverse_text.json").read_text())
    assert [(p["task"], p["rollout"]) for p in played] == [
        (f"eval/{t}", r) for t in range(3) for r in range(2)
    ]
    # Each policy once, in order: an evaluation waits for its own, training for the one that it needs.
    assert [int(name.split("/")[2]) for name in server.updates] == [0, 1, 2, 4]


async def test_a_server_on_ipv6_is_reached_by_its_url(here, reference):
    other = FakeInference()
    try:
        await other.start(host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert other.url == f"http://[::1]:{other.port}"
    try:
        run = await complete(settings(here / "run", deterministic=True), other)
    finally:
        await other.stop()
    assert parts(run) == reference


async def test_torn_late_and_aborted_answers_change_nothing(here, server, reference):
    server.tear_every, server.abort_every, server.delay_s = 7, 11, 0.004
    run = await complete(settings(here / "run", deterministic=True), server)
    assert parts(run) == reference
    assert sum(row["fault/retries"] for row in run.rows("orchestrator")) > 3


async def test_tokens_of_other_weights_are_discarded_and_the_server_is_given_its_policy_again(
    here, server, reference
):
    server.restart_at = {server.generated + n for n in (5, 20, 33, 50)}
    run = await complete(settings(here / "run", deterministic=True), server)
    assert parts(run) == reference
    assert sum(row["fault/reconciled"] for row in run.rows("orchestrator")) > 0


@pytest.mark.parametrize("killed_after", [0, 2])
async def test_killed_and_started_again_in_the_same_attempt_it_is_the_same_run(
    here, server, reference, killed_after
):
    server.delay_s = 0.02
    run = Run(settings(here / "run", deterministic=True), server.url)
    await run.start()
    await run.batch(killed_after)
    run.process.kill()
    assert (await run.wait())[0] == -signal.SIGKILL
    # What a server may look like then: paused in the middle of an update, or new.
    server.is_paused = True
    server.version = "default"
    await run.start()
    await run.finish()
    await run.close(0)
    assert parts(run) == reference


async def test_killed_and_continued_by_the_next_attempt_it_is_the_same_run(here, server, reference):
    server.delay_s = 0.02
    config = settings(here / "run", deterministic=True)
    run = Run(config, server.url)
    await run.start()
    await run.batch(1)
    run.process.kill()
    await run.wait()
    await run.close()
    # Rows that were not appended before the crash are completed from what was published.
    for role in ("orchestrator", "evals"):
        run.paths.metric(role).write_bytes(b"")
    server.restart()
    run = await complete(config, server)
    assert run.record.attempt == 2
    assert parts(run) == reference


async def test_asynchronous_batches_hold_every_draw_once_across_stops(here, server):
    server.delay_s = 0.01
    config = settings(here / "run", max_async_level=2, max_off_policy_steps=3)
    run = Run(config, server.url)
    await run.start()
    await run.batch(0)
    run.process.terminate()
    code, said = await run.wait()
    assert code == 75, said
    assert "the same command continues" in said
    await run.start()
    await run.batch(2)
    run.process.kill()
    await run.wait()
    await run.start()
    await run.finish()
    await run.close(0)
    trained = [sample.draw for step in range(STEPS) for sample in run.samples(step)]
    assert sorted(trained) == sorted(4 * list(range(12)))
    for step in range(STEPS):
        assert all(step - 2 <= sample.oldest_policy <= step for sample in run.samples(step))
    for step in (0, 2, 4):
        assert durable.read_committed(run.paths.eval(step)) is not None
    state = msgspec.json.decode(batchlog.read_state(run.paths.batch(STEPS - 1)))
    assert (state["next_draw"], state["running"], state["ready"]) == (12, [], [])


def journaled(run):
    """What the journal holds of a run: all of it, whoever wrote it."""
    found = []
    for path in journal.segments(run.paths):
        with contextlib.suppress(FileNotFoundError):  # trimmed meanwhile
            found += journal.read(path, is_newest=True)
    return found


def kept(run):
    """How many rollouts are on the disk: in the journal, in a batch, or held by the state of the newest."""
    found = {(e.draw, e.rollout) for e in journaled(run)}
    steps = durable.committed(run.paths.batches)
    for step in steps:
        found |= {(s.draw, s.rollout) for s in run.samples(step)}
    if steps:
        state = msgspec.json.decode(batchlog.read_state(run.paths.batch(max(steps))))
        found |= {(s["draw"], s["rollout"]) for group in state["ready"] for s in group["samples"]}
    return len(found)


async def killed_with(config, server, answers, finished):
    """A run whose orchestrator is killed after so many answers, when so many rollouts are kept."""
    server.hold_after = answers
    run = Run(config, server.url)
    await run.start()
    async with asyncio.timeout(20):
        while server.generated < answers or kept(run) < finished:
            assert run.process.returncode is None, await run.wait()
            await asyncio.sleep(0.01)
    run.process.kill()
    await run.wait()
    server.hold_after = None
    server.restart()
    return run


@pytest.mark.parametrize("is_next_attempt", [False, True])
@pytest.mark.parametrize("finished", [9, 31])
async def test_a_finished_rollout_is_not_generated_twice_and_deterministic_batches_are_the_same(
    here, server, finished, is_next_attempt
):
    config = settings(here / "run", deterministic=True, orchestrator={"eval": None})
    run = await killed_with(config, server, finished, finished)
    held = [entry.sample for entry in journaled(run)]
    assert len(held) == finished % 12
    if is_next_attempt:
        await run.close()
        run = Run(config, server.url)
    await run.start()
    await run.finish()
    await run.close(0)
    assert len(server.seeds) == STEPS * 12
    assert set(server.seeds.values()) == {1}
    assert sum(row["fault/replayed_from_journal"] for row in run.rows("orchestrator")) == finished % 12
    assert sum(row["fault/journal_mismatch"] for row in run.rows("orchestrator")) == 0
    trained = [msgspec.structs.replace(s, advantage=0.0) for s in run.samples(finished // 12)]
    assert all(sample in trained for sample in held)
    assert journaled(run) == [], "segments go with the batches that their draws are in"
    whole = await complete(settings(here / "whole", deterministic=True, orchestrator={"eval": None}), server)
    assert parts(run) == parts(whole)


async def test_asynchronous_rollouts_that_were_finished_are_not_generated_twice(here, server):
    config = settings(here / "run", max_async_level=2, max_off_policy_steps=3, orchestrator={"eval": None})
    run = await killed_with(config, server, 20, 20)
    held = {(e.draw, e.rollout): e.sample for e in journaled(run)}
    await run.start()
    await run.finish()
    await run.close(0)
    assert set(server.seeds.values()) == {1}
    trained = [msgspec.structs.replace(s, advantage=0.0) for k in range(STEPS) for s in run.samples(k)]
    assert len(trained) == len(server.seeds) == STEPS * 12
    assert all(held.get((s.draw, s.rollout), s) == s for s in trained)


async def test_a_failure_is_not_played_again_either(here, server):
    env = [{"id": "my_env:Talk", "args": {"failing": "some"}}]
    config = settings(here / "run", deterministic=True, orchestrator={"env": env, "eval": None})
    run = await killed_with(config, server, 16, 1)
    await run.start()
    await run.finish()
    await run.close(0)
    # What was cut between its turns is played from the first one on; nothing else is played twice.
    played = {(e.draw, e.rollout) for e in journaled(run)}
    assert played == set()
    replayed = sum(row["fault/replayed_from_journal"] for row in run.rows("orchestrator"))
    assert replayed > 0
    whole = settings(here / "whole", deterministic=True, orchestrator={"env": env, "eval": None})
    assert parts(run) == parts(await complete(whole, server))


async def test_rollouts_of_another_configuration_are_dropped_and_played_again(here, server):
    run = await killed_with(settings(here / "run", orchestrator={"eval": None}), server, 9, 9)
    await run.close()
    changed = {"eval": None, "sampling": {"max_tokens": 6}}
    config = settings(here / "run", ckpt={"resume_step": -1}, orchestrator=changed)
    run = await complete(config, server)
    assert sum(row["fault/journal_mismatch"] for row in run.rows("orchestrator")) == 9
    assert sum(row["fault/replayed_from_journal"] for row in run.rows("orchestrator")) == 0
    assert sorted(server.seeds.values()) == [1] * 39 + [2] * 9
    assert all(sum(s.mask) <= 6 for step in range(STEPS) for s in run.samples(step))


async def test_further_turns_continue_the_tokens_of_the_turns_before(here, server):
    env = [{"id": "my_env:Talk"}]
    run = await complete(settings(here / "run", orchestrator={"env": env}), server)
    for sample in run.samples(1):
        answers = [i for i in range(1, len(sample.mask)) if sample.mask[i] and not sample.mask[i - 1]]
        assert len(answers) == len(sample.versions) == 2
        second = tuple(sample.token_ids[: answers[1]])
        assert second in server.served_by_prompt
        # The template closes an answer, says the new message, and opens the next answer.
        assert sample.token_ids[answers[1] - 1] == 4
        assert sample.metrics == {"turns": 2.0}
    assert run.rows("evals")[-1]["eval/Talk/turns"] == 2.0


async def test_an_answer_gets_the_room_that_is_left_and_is_scored(here, server):
    """The prompt "<|user|>task 3<|im_end|><|assistant|>" has 9 tokens, so of a limit of 13 an answer gets 4, not 7."""
    server.max_model_len = 13
    (here / "one_turn.py").write_text(ONE_TURN)
    env = [{"id": "one_turn:One"}]
    run = await complete(
        settings(here / "run", deterministic=True, orchestrator={"env": env, "eval": None}), server
    )
    trained = [sample for step in range(STEPS) for sample in run.samples(step)]
    assert len(trained) == STEPS * 12
    assert {sum(s.mask) for s in trained} == {2, 3, 4}
    assert {len(s.token_ids) for s in trained if s.finish_reason == "length"} == {13}
    assert all(s.metrics == {"cut": float(s.finish_reason == "length")} for s in trained)
    assert 0 < sum(s.metrics["cut"] for s in trained) < len(trained)
    again = settings(here / "again", deterministic=True, orchestrator={"env": env, "eval": None})
    assert parts(await complete(again, server)) == parts(run)


ONE_TURN = """
from ratchet.envs.base import Environment, Score, Task

class One(Environment):
    size = 8
    def task(self, index, split):
        return Task(str(index), index)
    def messages(self, task):
        return [{"role": "user", "content": f"task {task.data}"}]
    def step(self, task, transcript):
        return Score(len(transcript.completion) / 8, {"cut": transcript.finish_reason == "length"})
"""


async def test_without_room_for_one_token_the_run_ends_with_the_reason_and_the_remedy(here, server):
    server.max_model_len = 9
    env = [{"id": "my_env:Talk"}]
    run = Run(settings(here / "run", orchestrator={"env": env, "eval": None}), server.url)
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 1
    assert "groups failed while batch 0 was made (too_long: " in said
    assert "raise inference.max_model_len" in said
    assert "in the orchestrator's log" not in said
    assert server.generated == 0


@pytest.mark.parametrize("has_lane", [True, False])
@pytest.mark.parametrize(("status", "expected"), [(400, 2), (422, 2), (404, 1)])
async def test_what_the_server_refuses_for_good_ends_the_orchestrator_for_good(
    here, server, status, expected, has_lane
):
    """With an exit code that the launcher does not answer by starting it again; 404 may be another server by then."""
    server.rejects = status
    server.facts["lane"] = 1 if has_lane else None
    run = Run(settings(here / "run", orchestrator={"eval": None}), server.url)
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == expected
    assert f"with {status}: temperature must be 7" in said
    assert "Traceback" not in said
    assert (code in FINAL) == (expected == 2)


async def test_a_failed_rollout_is_counted_and_never_a_reward(here, server):
    env = [{"id": "my_env:Talk", "args": {"failing": "some"}}]
    run = await complete(settings(here / "run", deterministic=True, orchestrator={"env": env}), server)
    trained = [sample for step in range(STEPS) for sample in run.samples(step)]
    # 12 draws of 8 tasks: tasks 1 and 3 fail on every rollout, each was drawn at least once.
    assert not {"train-1", "train-3"} & {sample.task for sample in trained}
    total = {}
    for row in run.rows("orchestrator"):
        for key, value in row.items():
            if key.startswith("rollouts/dropped/"):
                total[key.rpartition("/")[2]] = total.get(key.rpartition("/")[2], 0) + value
    assert total["env_error"] % 4 == total["bad_score"] % 4 == 0
    assert total["env_error"] > 0
    assert total["bad_score"] > 0
    assert len(trained) + sum(total.values()) == STEPS * 12


async def test_an_environment_that_always_fails_stops_the_run_with_a_sentence(here, server):
    env = [{"id": "my_env:Talk", "args": {"failing": "all"}}]
    run = Run(settings(here / "run", orchestrator={"env": env, "eval": None}), server.url)
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 1
    assert "groups failed while batch 0 was made" in said
    assert "ValueError: always" in said


async def test_a_server_of_another_architecture_is_refused(here, server):
    server.refuses = "its weights have 4 layers, this server has 2."
    run = Run(settings(here / "run"), server.url)
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 2
    assert "its weights have 4 layers" in said


@pytest.mark.parametrize(
    "script",
    [
        {"/update_weights": [409]},  # restarted after /start_weight_update: it lost the thread
        {"/update_weights": [500, 409], "/finish_weight_update": [503]},
        {"/start_weight_update": [409], "/resume": [409, 0]},
        {"/finish_weight_update": [0], "/weight_info": [0]},  # the name that it then reports is not ours
        {"/pause": [500], "/health": [503, 0], "/v1/models": [0]},
    ],
)
async def test_an_adoption_that_is_torn_anywhere_is_done_again_as_a_whole(here, server, script):
    server.script = script
    run = await complete(settings(here / "run", deterministic=True, max_steps=1), server)
    assert [int(name.split("/")[2]) for name in server.updates][-1] == 1
    assert not any(script.values())
    check_sample(run.samples(0)[0], policy=0)


async def test_a_server_that_never_holds_what_it_was_given_is_not_believed(here, server):
    server.script = {"/finish_weight_update": [204] * 99}
    client = {"retries": 2}
    run = Run(settings(here / "run", orchestrator={"client": client}), server.url)
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 1
    assert "failed 3 times" in said
    assert "it then reported version 'default'" in said
    assert server.generated == 0


async def test_an_evaluation_that_is_missing_at_a_resume_is_played_if_its_weights_are_there(here, server):
    config = settings(here / "run", deterministic=True)
    run = await complete(config, server)
    before = parts(run)
    for lost in (run.paths.eval(0), run.paths.eval(2), run.paths.eval(4), run.paths.batch(3)):
        shutil.rmtree(lost)
    shutil.rmtree(run.paths.weight(0))
    with_another_outcome(run)
    run = Run(config, server.url)
    run.unpublished = {0}
    await run.start()
    said = await run.finish()
    await run.close(0)
    after = parts(run)
    assert "policy 0 is gone" in said
    assert [row["step"] for row in run.rows("evals")] == [2, 4]
    for name in ("evals/step_2", "evals/step_4", "batches/step_3"):
        assert after[name] == before[name]


def with_another_outcome(run):
    """The record of an attempt that did not finish."""
    stage = Stage.open(run.paths, "001.test.0")
    attempts.write(stage, msgspec.structs.replace(run.record, outcome=attempts.Outcome(1, "test")))


async def test_nobody_answering_is_refused_after_the_wait(here):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = {"wait_s": 0.3}
    run = Run(settings(here / "run", orchestrator={"client": client}), f"http://127.0.0.1:{port}")
    await run.start()
    code, said = await run.wait()
    await run.close()
    assert code == 2
    assert f"nobody answers at http://127.0.0.1:{port} after 0.3 s" in said


async def test_a_replaced_orchestrator_stops_without_publishing(here, server):
    run = Run(settings(here / "run", orchestrator={"eval": None}), server.url)
    run.trainer = asyncio.create_task(asyncio.sleep(60))  # no weights: the orchestrator waits
    await run.start()
    token = attempts.token(run.record.attempt, "orchestrator", 1)
    while not (run.paths.staging / token).exists():
        await asyncio.sleep(0.01)
    run.opened.stage.revoke(token)
    code, said = await run.wait()
    await run.close()
    assert code == 76, said


async def test_stopped_while_it_waits_for_weights_it_ends_promptly(here, server):
    run = Run(settings(here / "run"), server.url)
    run.trainer = asyncio.create_task(asyncio.sleep(60))
    await run.start()
    assert run.process.stderr is not None
    while b"at batch 0" not in await run.process.stderr.readline():
        pass
    run.process.terminate()
    code, _ = await asyncio.wait_for(run.wait(), 5)
    await run.close()
    assert code == 75
