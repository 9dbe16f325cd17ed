"""From the groups of a batch to what is published: advantages, and the batch's metric row."""

from collections.abc import Iterable
from statistics import fmean, pstdev

import msgspec
import numpy as np

from ratchet.metrics import Row
from ratchet.orchestrator.advantage import group_advantages
from ratchet.orchestrator.evals import mean_metrics
from ratchet.orchestrator.scheduler import Batch, Group
from ratchet.process import without_collector
from ratchet.records import Progress, Sample


@without_collector()
def credited(groups: Iterable[Group], *, divide_by_std: bool) -> list[Sample]:
    """The samples of a batch with their advantages, ordered by draw and rollout."""
    samples = []
    for group in groups:
        rewards_PG = np.array([[sample.reward for sample in group.samples]])
        advantages_G = group_advantages(rewards_PG, divide_by_std=divide_by_std)[0]
        for sample, advantage in zip(group.samples, advantages_G, strict=True):
            samples.append(msgspec.structs.replace(sample, advantage=float(advantage)))
    return samples


def exact_row(batch: Batch, samples: list[Sample], progress: Progress) -> Row:
    """The part of a batch's row that a repetition must reproduce. `step` is the policy that it leads to.

    `policy/off_policy_steps` is the mean over samples of how many steps their oldest token lies behind.
    `reward/equal_groups` is the share of groups that teach nothing, because all their rewards are equal.
    """
    rewards = [sample.reward for sample in samples]
    sampled = [sum(sample.mask) for sample in samples]
    row: Row = {
        "step": batch.step + 1,
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/equal_groups": fmean(_is_equal(group) for group in batch.groups),
        "completion/mean_length": fmean(sampled),
        "completion/cut": fmean(sample.finish_reason == "length" for sample in samples),
        "policy/off_policy_steps": fmean(batch.step - sample.oldest_policy for sample in samples),
        "rollouts/trained": len(samples),
        "rollouts/tokens": sum(sampled),
        "progress/total_samples": progress.total_samples,
        "progress/total_tokens": progress.total_tokens,
        "progress/total_problems": progress.total_problems,
    }
    for label in sorted({sample.env for sample in samples}):
        own = [sample for sample in samples if sample.env == label]
        row[f"reward/{label}/mean"] = fmean(sample.reward for sample in own)
        means = mean_metrics(sample.metrics for sample in own)
        row |= {f"env/{label}/{name}": value for name, value in means.items()}
    return row | {f"rollouts/dropped/{reason}": count for reason, count in batch.dropped.items()}


def _is_equal(group: Group) -> bool:
    return len({sample.reward for sample in group.samples}) == 1
