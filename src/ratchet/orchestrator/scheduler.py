"""What is drawn next and which groups make a batch. Pure bookkeeping: no I/O, no asyncio, no clock.

    start ──► Draw ──(the loop plays its rollouts)──► finish ──► ready ──► take_batch ──► Batch
                                                        └──► dropped, with a counted reason

Every draw ends in exactly one place: trained, dropped, or held by the state (running or ready). The state
rides in each batch, so a restored scheduler draws what the lost one would have drawn.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from ratchet.errors import RatchetError
from ratchet.records import Progress, Sample
from ratchet.rng import EpochOrder, derive

FAILED = "failed"
NO_SIBLINGS = "no_siblings"
TOO_OLD = "too_old"
ENV_REMOVED = "env_removed"
INPUT_CHANGED = "input_changed"
# What most failures of a reason come from, and what helps.
_REMEDIES = {
    "env_error": "the environment raises; its errors are in the orchestrator's log",
    "bad_score": "the environment gives scores that are not finite numbers: mend it",
    "too_long": (
        "the conversations leave no room for an answer: raise inference.max_model_len (of a server of your own its "
        "--max-model-len), or shorten the prompts"
    ),
    "empty": "the server samples answers without a token: look at its log",
    "no_siblings": "one rollout of a group is not enough: see why the others fail",
}
_OWN_REASON = "these failures are returned by the environment: mend it or its data"
# So many batches' worth of groups may fail for one batch before the run is stopped as hopeless.
_HOPELESS_BATCHES = 10
_HOPELESS_GROUPS = 50


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that scheduling depends on."""

    seed: int
    groups_per_batch: int
    max_steps: int
    max_async_level: int
    max_off_policy_steps: int
    deterministic: bool = False
    inputs: str = ""
    """Digest of what the run reads: groups that were finished under another one are played again."""

    def required_policy(self, batch: int) -> int:
        """The oldest policy that may sample batch `batch`; in deterministic mode the only one."""
        return max(0, batch - self.max_async_level)


class EnvShare(msgspec.Struct, frozen=True):
    """One environment as the scheduler sees it."""

    label: str
    weight: float
    size: int


class Draw(msgspec.Struct, frozen=True):
    """One task drawn for training: row `row`, the `count`-th draw of its environment."""

    draw: int
    env: str
    count: int
    row: int


class Group(msgspec.Struct, frozen=True):
    """The rollouts of one draw that can be trained on, in order."""

    draw: int
    samples: list[Sample]
    env: str = ""
    count: int = -1
    """Of its draw; unknown in states of versions before."""

    @property
    def oldest_policy(self) -> int:
        return min(sample.oldest_policy for sample in self.samples)


class Batch(msgspec.Struct, frozen=True):
    """The groups of one optimizer step, by draw, and the rollouts dropped since the batch before."""

    step: int
    groups: list[Group]
    dropped: dict[str, int]


class Unsettled(msgspec.Struct, frozen=True):
    """The draws that a state leaves open: running, or not drawn yet. All others are in it, in a batch or dropped."""

    next_draw: int
    running: frozenset[int]

    def __contains__(self, draw: object) -> bool:
        return isinstance(draw, int) and (draw >= self.next_draw or draw in self.running)


class EnvCount(msgspec.Struct):
    """How often an environment was drawn: ever, and when the shares were last changed."""

    label: str
    weight: float
    drawn: int = 0
    base: int = 0


class State(msgspec.Struct, kw_only=True):
    """Everything that cannot be derived. `drops` are (draw, reason) pairs: the ledger of what is not trained."""

    format: int = 1
    progress: Progress
    next_draw: int = 0
    drawn_for_batch: int = 0
    envs: list[EnvCount]
    running: list[Draw] = []
    ready: list[Group] = []
    dropped: dict[str, int] = {}
    """Groups dropped in the whole run, by reason."""
    drops_of_batch: list[tuple[int, str]] = []
    """Those dropped between the two newest batches."""
    drops_since: list[tuple[int, str]] = []
    """Those dropped since the newest batch."""
    rollouts_dropped_since: dict[str, int] = {}
    inputs: str = ""
    """Digest of what made the groups of this batch, and those that are ready."""


class Scheduler:
    """Verbs: start / finish / take_batch / state / restore."""

    def __init__(self, rules: Rules, envs: Iterable[EnvShare]) -> None:
        self._rules = rules
        shares = list(envs)
        self._orders = {
            env.label: EpochOrder(derive(rules.seed, "tasks", env.label), env.size) for env in shares
        }
        self._counts = {env.label: EnvCount(env.label, env.weight) for env in shares}
        self._gone: dict[str, EnvCount] = {}
        self.progress = Progress()
        self._next_draw = 0
        self._drawn_for_batch = 0
        self._running: dict[int, Draw] = {}
        self._again: list[Draw] = []
        self._ready: dict[int, Group] = {}
        self._dropped: Counter[str] = Counter()
        self._drops_of_batch: list[tuple[int, str]] = []
        self._drops_since: list[tuple[int, str]] = []
        self._rollouts_dropped: Counter[str] = Counter()
        self.input_changed = 0
        """Finished rollouts of the state that were made with other inputs, and are played again."""

    @property
    def next_batch(self) -> int:
        return self.progress.step

    @property
    def running(self) -> int:
        """Draws that are being played."""
        return len(self._running)

    @property
    def ready(self) -> int:
        """Finished groups that are in no batch yet."""
        return len(self._ready)

    @property
    def rollouts_dropped(self) -> dict[str, int]:
        """By reason, since the newest batch."""
        return dict(sorted(self._rollouts_dropped.items()))

    @property
    def is_complete(self) -> bool:
        return self.progress.step >= self._rules.max_steps

    def start(self, policy: int) -> Draw | None:
        """The next draw that may be played by `policy` (-1: none yet); None while there is nothing to start."""
        if policy < 0 or not self._may_start(policy):
            return None
        draw = self._again.pop(0) if self._again else self._new_draw()
        self._running[draw.draw] = draw
        return draw

    def _may_start(self, policy: int) -> bool:
        rules, batch = self._rules, self.progress.step
        if rules.deterministic:
            is_time = batch < rules.max_steps and policy == rules.required_policy(batch)
            return is_time and (bool(self._again) or self._drawn_for_batch < rules.groups_per_batch)
        batches = min(policy + rules.max_async_level + 1, rules.max_steps) - batch
        return len(self._ready) + len(self._running) < batches * rules.groups_per_batch

    def _new_draw(self) -> Draw:
        env = min(self._counts.values(), key=lambda e: (e.drawn - e.base + 1) / e.weight)
        draw = Draw(self._next_draw, env.label, env.drawn, self._orders[env.label].row(env.drawn))
        env.drawn += 1
        self._next_draw += 1
        self._drawn_for_batch += 1
        return draw

    def finish(self, draw: int, samples: list[Sample], failures: Mapping[str, int]) -> None:
        """Take the outcome of a draw: its scored rollouts, and how many failed for which reason.

        Raises: RatchetError if so many groups failed that the run makes no progress.
        """
        made = self._running.pop(draw)
        self._rollouts_dropped.update(failures)
        if len(samples) >= 2:
            self._ready[draw] = Group(draw, samples, made.env, made.count)
            return
        if samples:
            self._rollouts_dropped[NO_SIBLINGS] += len(samples)
        self._drop(draw, FAILED)
        self._check_hope()

    def _drop(self, draw: int, reason: str) -> None:
        self._dropped[reason] += 1
        self._drops_since.append((draw, reason))

    def _check_hope(self) -> None:
        failed = sum(reason == FAILED for _, reason in self._drops_since)
        if failed >= max(_HOPELESS_BATCHES * self._rules.groups_per_batch, _HOPELESS_GROUPS):
            raise RatchetError(
                f"{failed} groups failed while batch {self.next_batch} was made ({self._reasons()}): "
                f"{self._remedy()}."
            )

    def _reasons(self) -> str:
        return ", ".join(f"{reason}: {n}" for reason, n in sorted(self._rollouts_dropped.items()))

    def _remedy(self) -> str:
        """What the most frequent failure comes from. One that was dropped for its age is no failure."""
        counts = {reason: n for reason, n in sorted(self._rollouts_dropped.items()) if reason != TOO_OLD}
        return _REMEDIES.get(max(counts, key=lambda reason: counts[reason], default=""), _OWN_REASON)

    def take_batch(self) -> Batch | None:
        """The next batch as soon as it is full; None before. Groups that are too old are dropped here.

        Raises: RatchetError in deterministic mode if no group of the batch survived.
        """
        groups = self._take_fixed() if self._rules.deterministic else self._take_first()
        if groups is None:
            return None
        batch = Batch(self.progress.step, groups, dict(sorted(self._rollouts_dropped.items())))
        for group in groups:
            del self._ready[group.draw]
            self.progress.total_samples += len(group.samples)
            self.progress.total_tokens += sum(len(sample.token_ids) for sample in group.samples)
        self.progress.total_problems += len(groups)
        self.progress.step += 1
        self._drawn_for_batch = 0
        self._drops_of_batch, self._drops_since = sorted(self._drops_since), []
        self._rollouts_dropped.clear()
        return batch

    def _take_first(self) -> list[Group] | None:
        """Asynchronous: the first groups that are finished; what was dropped is drawn anew."""
        if self.is_complete or len(self._ready) < self._rules.groups_per_batch:
            return None
        oldest = self.progress.step - self._rules.max_off_policy_steps
        for group in [g for g in self._ready.values() if g.oldest_policy < oldest]:
            del self._ready[group.draw]
            self._rollouts_dropped[TOO_OLD] += len(group.samples)
            self._drop(group.draw, TOO_OLD)
        if len(self._ready) < self._rules.groups_per_batch:
            return None
        return [self._ready[draw] for draw in sorted(self._ready)][: self._rules.groups_per_batch]

    def _take_fixed(self) -> list[Group] | None:
        """Deterministic: exactly the draws of this batch; smaller where some were dropped."""
        if self._drawn_for_batch < self._rules.groups_per_batch or self._running or self._again:
            return None
        if not self._ready:
            raise RatchetError(
                f"No group of batch {self.next_batch} survived ({self._reasons()}), and in deterministic mode "
                f"nothing is drawn in its place: {self._remedy()}."
            )
        return [self._ready[draw] for draw in sorted(self._ready)]

    def state(self) -> bytes:
        """Everything that a restored scheduler needs, as JSON; the same history gives the same bytes."""
        running = [*self._again, *self._running.values()]
        state = State(
            progress=self.progress,
            next_draw=self._next_draw,
            drawn_for_batch=self._drawn_for_batch,
            envs=[*self._counts.values(), *self._gone.values()],
            running=sorted(running, key=lambda d: d.draw),
            ready=[self._ready[draw] for draw in sorted(self._ready)],
            dropped=dict(self._dropped),
            drops_of_batch=self._drops_of_batch,
            drops_since=sorted(self._drops_since),
            rollouts_dropped_since=dict(self._rollouts_dropped),
            inputs=self._rules.inputs,
        )
        return msgspec.json.encode(state, order="deterministic")

    def unsettled(self) -> Unsettled:
        """What the state of this moment leaves open."""
        return Unsettled(self._next_draw, frozenset([*self._running, *(d.draw for d in self._again)]))

    def restore(self, data: bytes) -> None:
        """Continue where `state` was taken: running draws are started again, with the same seeds."""
        state = msgspec.json.decode(data, type=State)
        self.progress = state.progress
        self._next_draw = state.next_draw
        self._drawn_for_batch = state.drawn_for_batch
        self._dropped = Counter(state.dropped)
        self._drops_of_batch, self._drops_since = state.drops_of_batch, state.drops_since
        self._rollouts_dropped = Counter(state.rollouts_dropped_since)
        self._restore_counts(state.envs)
        again = list(state.running)
        for group in state.ready:
            if not state.inputs or state.inputs == self._rules.inputs:
                self._ready[group.draw] = group
                continue
            self.input_changed += len(group.samples)
            if group.count >= 0:
                again.append(Draw(group.draw, group.env, group.count, -1))
            else:
                self._drop(group.draw, INPUT_CHANGED)
        for draw in sorted(again, key=lambda d: d.draw):
            if draw.env in self._orders:
                row = self._orders[draw.env].row(draw.count)
                self._again.append(msgspec.structs.replace(draw, row=row))
            else:
                self._drop(draw.draw, ENV_REMOVED)

    def _restore_counts(self, counted: list[EnvCount]) -> None:
        """Shares that changed start afresh: a new environment does not have to catch up with the others."""
        known = {count.label: count for count in counted}
        before = [(count.label, count.weight) for count in counted if count.weight > 0]
        is_changed = before != [(count.label, count.weight) for count in self._counts.values()]
        for label, count in self._counts.items():
            if label in known:
                count.drawn = known[label].drawn
                count.base = count.drawn if is_changed else known[label].base
        gone = {label: count.drawn for label, count in known.items() if label not in self._counts}
        self._gone = {label: EnvCount(label, 0.0, drawn) for label, drawn in gone.items()}
