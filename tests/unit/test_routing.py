"""Which server answers which request: every placement here is worked by hand."""

import pytest

from ratchet.orchestrator.routing import Router, Rules

RULES = Rules(capacity=4, slack=2, slow_start_s=8.0)
LATER = 100.0


def router(servers=3, *, opened=(0, 1, 2), **changed):
    made = Router(servers, Rules(**({"capacity": 4, "slack": 2, "slow_start_s": 8.0} | changed)))
    for server in opened:
        made.open(server, 0.0)
    return made


def ask(made, *groups, now=LATER, first=0):
    """Ask one request after the other, each placed before the next; returns the servers."""
    found = []
    for ticket, group in enumerate(groups, start=first):
        made.ask(ticket, group)
        found += [server for _, server in made.place(now)]
    return found


def test_groups_go_to_the_server_with_the_least_to_do_and_stay_there():
    assert ask(router(), "a", "b", "c", "a", "b", "c") == [0, 1, 2, 0, 1, 2]


def test_a_home_may_be_ahead_by_the_slack_and_not_by_more():
    # With one more request a's home would have 1, 2, 3 against 1 elsewhere; 4 - 2 > 1 goes to the next one.
    made = router()
    assert ask(made, "a", "a", "a", "a", "a") == [0, 0, 0, 1, 2]
    # Home 0 has 3, the others 1 each: 4 - 2 <= 2, so the group is at home again, which is full then.
    assert ask(made, "a", "a", first=5) == [0, 1]


def test_nothing_goes_to_a_closed_server_and_its_groups_move_for_good():
    made = router()
    assert ask(made, "a", "b", "c") == [0, 1, 2]
    made.close(1)
    assert ask(made, "b", first=3) == [0]
    made.open(1, 0.0)
    # Server 1 has one request, server 0 two: 3 - 2 <= 2, and 0 is the home of b now.
    assert ask(made, "b", first=4) == [0]


def test_requests_wait_in_order_while_no_server_has_room():
    made = router(opened=(0,), capacity=2)
    for ticket, group in enumerate("abcd"):
        made.ask(ticket, group)
    assert made.place(LATER) == [(0, 0), (1, 0)]
    assert (made.waiting, made.place(LATER)) == (2, [])
    made.withdraw(2)
    made.finish(0, 0)
    assert made.place(LATER) == [(3, 0)]
    assert made.waiting == 0


def test_without_any_open_server_everything_waits():
    made = router(opened=())
    assert ask(made, "a", "b") == []
    made.open(2, 0.0)
    assert made.place(LATER) == [(0, 2), (1, 2)]


def test_what_is_open_at_a_closed_server_counts_until_it_is_finished():
    made = router(opened=(0,), capacity=1)
    assert ask(made, "a") == [0]
    made.close(0)
    made.open(0, 0.0)
    assert ask(made, "b", first=1) == []
    made.finish(0, 0)
    made.finish(0, 0)  # twice is once
    assert made.place(LATER) == [(1, 0)]


# The share of a server that was opened at 0 is 1/8 + 7/8 * now / 8 s: 1/8, 9/16 and 1 after 0, 4 and 8 s. One more
# request makes (busy + 1) / share of it: 8, 16/9 and 1 for the first. The other server is at full share.
@pytest.mark.parametrize(
    ("now", "servers"),
    [
        (0.0, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]),  # 1..7 < 8; 8 = 8 goes to the first; 9 > 8
        (4.0, [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]),  # 1 < 16/9 < 2, 3 < 32/9 < 4, 5 < 48/9 < 6, 7 < 64/9
        (8.0, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_a_server_that_was_just_opened_gets_little_at_first(now, servers):
    made = Router(2, Rules(capacity=20, slack=0, slow_start_s=8.0))
    made.open(0, -LATER)
    made.open(1, 0.0)
    assert ask(made, *range(10), now=now) == servers


def test_a_single_server_gets_everything_at_once_however_new_it_is():
    made = router(1, opened=(0,))
    assert ask(made, "a", "b", "a", "c", now=0.0) == [0, 0, 0, 0]


def test_servers_that_were_all_opened_now_keep_groups_together_too():
    # All have an eighth: the home of a has 8, 16 and 24 a request, of which the slack takes 16, against 8 elsewhere.
    made = router()
    assert ask(made, "a", "a", "a", "b", "c", now=0.0) == [0, 0, 0, 1, 2]


def test_without_slow_start_a_new_server_has_its_full_share():
    made = Router(2, Rules(capacity=20, slack=0, slow_start_s=0.0))
    made.open(0, -LATER)
    made.open(1, 0.0)
    assert ask(made, *range(4), now=0.0) == [0, 1, 0, 1]
