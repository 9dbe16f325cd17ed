"""Warnings about a run, from its metric rows alone: pure functions, each with its remedy.

A rule looks at the whole curve and says the step at which it was first true, so that the answer does not depend on
when somebody looked. Curves are smoothed over WINDOW steps; nothing is said before 2 * WINDOW of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import msgspec

from ratchet.metrics import Row

WINDOW = 5
_USUAL = 100

Curve = list[tuple[int, float]]
"""(step, value) pairs in order."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule needs to know of the configuration."""

    max_off_policy_steps: int = 8


class Warning(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, since when, and what to do."""

    key: str
    step: int
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}. {self.remedy}"


def column(rows: Sequence[Row], name: str) -> Curve:
    """One quantity over the steps that have it."""
    return [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]


def smooth(curve: Curve, window: int = WINDOW) -> Curve:
    """Trailing means of `window` values: the first is at the `window`-th step."""
    values = [value for _, value in curve]
    ends = range(window, len(curve) + 1)
    return [(curve[end - 1][0], sum(values[end - window : end]) / window) for end in ends]


def check(trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits) -> list[Warning]:
    """Every warning that the rows give rise to, at most one of a kind, by the step where it began."""
    found = [warning for rule in _RULES for warning in rule(trainer, orchestrator, limits)]
    return sorted(found, key=lambda warning: (warning.step, warning.key))


def _reward_collapse(
    trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits
) -> Iterator[Warning]:
    """More than half of what the run had gained is lost, by more than its steps usually differ."""
    curve = column(orchestrator, "reward/mean")
    means = smooth(curve)
    if len(means) <= WINDOW:
        return
    lowest = best = means[0][1]
    steps = [abs(b - a) for (_, a), (_, b) in itertools.pairwise(curve)]
    noise = median(steps)
    for step, value in means[1:]:
        if best - value > max(0.5 * (best - lowest), 2 * noise) and best > lowest:
            yield Warning(
                key="reward_collapse",
                step=step,
                text=f"the reward fell from {best:.3f} to {value:.3f} (means of {WINDOW} steps)",
                remedy="Go back with --ckpt.resume-step and lower the learning rate, or max_async_level.",
            )
            return
        if value > best:
            best = value
        elif best == means[0][1]:
            lowest = min(lowest, value)


def _entropy_collapse(
    trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits
) -> Iterator[Warning]:
    """The policy became near-certain of its tokens, and the rollouts of a task no longer differ in reward."""
    means = smooth(column(trainer, "policy/entropy"))
    spread = dict(smooth(column(orchestrator, "reward/equal_groups")))
    if len(means) <= WINDOW or means[0][1] <= 0:
        return
    first = means[0][1]
    for step, value in means[WINDOW:]:
        if value < 0.1 * first and spread.get(step, 0.0) > 0.5:
            yield Warning(
                key="entropy_collapse",
                step=step,
                text=f"the entropy fell from {first:.3f} to {value:.4f} nats a token, and "
                f"{spread[step]:.0%} of the groups have equal rewards",
                remedy="Go back with --ckpt.resume-step and lower the learning rate, raise "
                "orchestrator.sampling.temperature, or give harder tasks.",
            )
            return


def _kl_blow_up(trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits) -> Iterator[Warning]:
    """The policy that trains and the one that sampled have drifted apart."""
    means = smooth(column(trainer, "policy/mismatch_kl"), 3)
    for index, (step, value) in enumerate(means):
        if index < WINDOW or value <= 0.1:
            continue
        usual = median(v for _, v in means[max(0, index - _USUAL) : index])
        if value > 5 * usual:
            yield Warning(
                key="kl_blow_up",
                step=step,
                text=f"the KL between the policy that trains and the one that sampled rose to {value:.3f}, "
                f"usually {usual:.4f}",
                remedy="Lower the learning rate or max_async_level; if it began with a restart, compare the "
                "engine's logprobs with the trainer's.",
            )
            return


def _equal_groups(trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits) -> Iterator[Warning]:
    """Most groups teach nothing: all their rollouts got the same reward."""
    for step, value in smooth(column(orchestrator, "reward/equal_groups")):
        if value > 0.8:
            yield Warning(
                key="equal_groups",
                step=step,
                text=f"{value:.0%} of the groups have equal rewards, so their advantages are zero",
                remedy="Give tasks that are sometimes solved and sometimes not, a finer reward, or a larger "
                "orchestrator.group_size.",
            )
            return


def _growing_staleness(
    trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits
) -> Iterator[Warning]:
    """Rollouts get older than they were, and near the age at which they are dropped."""
    means = smooth(column(orchestrator, "policy/off_policy_steps"))
    if len(means) <= WINDOW:
        return
    first = means[0][1]
    for step, value in means[WINDOW:]:
        if value > max(1.0, 2 * first) and value > 0.5 * limits.max_off_policy_steps:
            yield Warning(
                key="growing_staleness",
                step=step,
                text=f"rollouts are {value:.1f} steps old when they are trained, at first {first:.1f}; "
                f"they are dropped beyond {limits.max_off_policy_steps}",
                remedy="Generation is too slow for this much asynchrony: add inference capacity, shorten "
                "orchestrator.sampling.max_tokens, or lower max_async_level.",
            )
            return


def _slow_env(trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits) -> Iterator[Warning]:
    """Most of a rollout's time passes in the environment's own code."""
    shares = [
        (row["step"], row["time/env_s"] / row["time/rollouts_s"])
        for row in orchestrator
        if row.get("time/rollouts_s", 0) > 0 and row.get("time/env_s", 0) > 1.0
    ]
    for step, value in smooth(shares):
        if value > 0.5:
            yield Warning(
                key="slow_env",
                step=step,
                text=f"{value:.0%} of the time of a rollout passes in the environment's own code",
                remedy="Make reward and step faster, or `async` so that rollouts overlap; a blocking call holds "
                "up all of them.",
            )
            return


def _dropped(trainer: Sequence[Row], orchestrator: Sequence[Row], limits: Limits) -> Iterator[Warning]:
    """A good part of what was generated is thrown away."""
    shares = []
    for row in orchestrator:
        lost = {k.rpartition("/")[2]: v for k, v in row.items() if k.startswith("rollouts/dropped/")}
        total = sum(lost.values()) + row.get("rollouts/trained", 0)
        shares.append((row["step"], sum(lost.values()) / total if total else 0.0, lost))
    for step, value in smooth([(step, share) for step, share, _ in shares]):
        if value > 0.25:
            lost = next(lost for at, _, lost in shares if at == step)
            most = max(lost, key=lambda reason: lost[reason], default="several reasons")
            yield Warning(
                key="dropped_rollouts",
                step=step,
                text=f"{value:.0%} of the rollouts are dropped, most for {most}",
                remedy="The orchestrator's log shows the first errors of an environment; too_old asks for a lower "
                "max_async_level, too_long for a larger inference.max_model_len.",
            )
            return


_RULES: tuple[Callable[[Sequence[Row], Sequence[Row], Limits], Iterator[Warning]], ...] = (
    _reward_collapse,
    _entropy_collapse,
    _kl_blow_up,
    _equal_groups,
    _growing_staleness,
    _slow_env,
    _dropped,
)
