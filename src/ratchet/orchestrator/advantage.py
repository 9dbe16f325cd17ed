"""Credit within a group: what a rollout did better than its siblings."""

import numpy as np

_STD_FLOOR = 1e-6


def group_advantages(rewards_PG: np.ndarray, *, divide_by_std: bool) -> np.ndarray:
    """Credit each rollout relative to its siblings on the same task.

    Shapes: rewards_PG (P, G) -> (P, G) float64
    Raises: ValueError if G < 2: one rollout has no siblings.
    Source: GRPO, arXiv:2402.03300; mean-only variant, arXiv:2503.20783
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {rewards_PG.shape}: groups need two rollouts or more to be compared with"
        )
    advantages_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if divide_by_std:
        advantages_PG /= rewards_PG.std(axis=1, keepdims=True) + _STD_FLOOR
    return advantages_PG
