"""From rewards to advantages, per prompt group.

Totals are [P G] float64, one row a prompt group. Every statistic names its `ddof` and `eps`: frameworks differ in
both, and rewards 1, 1, 0, 0 become advantages of 0.866 or 1.0 accordingly.
"""

from __future__ import annotations

import numpy as np

from common.config.method import AdvantageConfig

SPREAD_TOLERANCE = 1e-8


def group_mean(totals: np.ndarray) -> np.ndarray:
    """Reward minus the mean of its group (Dr. GRPO, arXiv 2503.20783). [P G] -> [P G]."""
    return totals - totals.mean(axis=1, keepdims=True)


def group_std(totals: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    """Centred and divided by the group's standard deviation (GRPO, arXiv 2402.03300). [P G] -> [P G]."""
    return group_mean(totals) / (totals.std(axis=1, ddof=ddof, keepdims=True) + eps)


def group_mean_batch_std(totals: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    """Centred by group, divided by the standard deviation of all rewards (Lite PPO, arXiv 2508.08221). [P G]."""
    return group_mean(totals) / (totals.std(ddof=ddof) + eps)


def rloo(totals: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the other G - 1 (leave-one-out, arXiv 2402.14740). [P G] -> [P G]."""
    size = totals.shape[1]
    return totals - (totals.sum(axis=1, keepdims=True) - totals) / (size - 1)


def floor(totals: np.ndarray, threshold: float) -> np.ndarray:
    """Baseline max(group mean, threshold): a failure is never pushed up (CoRPO, arXiv 2511.04439). [P G] -> [P G]."""
    return totals - np.maximum(totals.mean(axis=1, keepdims=True), threshold)


def gdpo(scores: np.ndarray, present: np.ndarray, term_weights: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    """Each verifier normalised within its group, summed, whitened over the batch (GDPO, arXiv 2601.05242).

    scores: [P G K] float64. present: [P G K] bool; absent scores enter no statistic. term_weights: [P K], the recipe's
    weight of each verifier. The whitened sum is divided by the root of the number of verifiers a sample has, those of
    weight 0 not counted, so that labels with many verifiers do not outweigh the others. Returns [P G].
    """
    normalised = _normalise_present(scores, present, ddof, eps)
    summed = (normalised * term_weights[:, None, :]).sum(axis=2)
    whitened = (summed - summed.mean()) / (summed.std(ddof=ddof) + eps)
    active = present & (term_weights != 0)[:, None, :]
    return whitened / np.sqrt(np.maximum(active.sum(axis=2), 1))


def _normalise_present(scores: np.ndarray, present: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    count = present.sum(axis=1, keepdims=True)
    held = np.where(present, scores, 0.0)
    centred = np.where(present, scores - held.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - ddof, 1))
    return centred / (std + eps)


def informative(
    config: AdvantageConfig, totals: np.ndarray, scores: np.ndarray, present: np.ndarray, term_weights: np.ndarray
) -> np.ndarray:
    """Which groups carry a gradient: [P] bool. Shapes as in `advantages`.

    Judged by the spread of what is trained on (the total, or any single verifier with a weight for `gdpo`); with
    `floor` a group of equal failures still teaches, so there the advantage itself decides.
    """
    if config.type == "floor":
        return np.abs(floor(totals, config.floor_threshold)).max(axis=1) > SPREAD_TOLERANCE
    if config.type == "gdpo":
        low = np.where(present, scores, np.inf).min(axis=1)
        high = np.where(present, scores, -np.inf).max(axis=1)
        return (((high - low) > SPREAD_TOLERANCE) & (term_weights != 0)).any(axis=1)
    return np.ptp(totals, axis=1) > SPREAD_TOLERANCE


def advantages(
    config: AdvantageConfig,
    totals: np.ndarray,
    scores: np.ndarray,
    present: np.ndarray,
    term_weights: np.ndarray,
) -> np.ndarray:
    """Advantages [P G] float64 of one step by the configured rule.

    Statistics over the batch span the step's groups, however many updates they are split into, as elsewhere in the
    field: of an update alone they would be noisier and depend on the split.

    totals: [P G]; scores, present: [P G K]; term_weights: [P K]. Only `gdpo` looks at the last three.
    """
    match config.type:
        case "group_std":
            return group_std(totals, config.ddof, config.eps)
        case "group_mean":
            return group_mean(totals)
        case "group_mean_batch_std":
            return group_mean_batch_std(totals, config.ddof, config.eps)
        case "rloo":
            return rloo(totals)
        case "floor":
            return floor(totals, config.floor_threshold)
        case "gdpo":
            return gdpo(scores, present, term_weights, config.ddof, config.eps)
