"""Token weights: every denominator of the loss, computed once on the host from counts over the whole update.

One entry a sequence; a sequence's weight stands at each of its trained tokens. Micro-batching, packing and data
parallelism then cannot change the result.
"""

from __future__ import annotations

import numpy as np

from common.arrays import sequence_sum
from common.config.method import ImportanceConfig


def sequence_weights(aggregation: str, lengths: np.ndarray, num_before_drops: float, max_length: int) -> np.ndarray:
    """Weight of each token of each sequence, [N] float64.

    lengths: [N] int, trained tokens of each kept sequence of one update. `token_mean` and `sequence_mean` weights
    sum to 1 over the update's tokens; `fixed_length` (Dr. GRPO, arXiv 2503.20783) is 1 / (max_length x number of
    sequences counted before uninformative groups were dropped).
    """
    if len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(
            f"every sequence of an update needs at least one trained token; lengths are {lengths.tolist()}"
        )
    match aggregation:
        case "token_mean":
            return np.full(len(lengths), 1.0 / lengths.sum())
        case "sequence_mean":
            return 1.0 / (lengths * len(lengths))
        case "fixed_length":
            return np.full(len(lengths), 1.0 / (max_length * num_before_drops))
        case _:
            raise AssertionError(aggregation)


def importance_weights(
    config: ImportanceConfig, old: np.ndarray, sampling: np.ndarray, sampled: np.ndarray, segment_ids: np.ndarray
) -> np.ndarray:
    """Factor on the policy weight of each sampled token, [B T] float64, 1 elsewhere.

    old, sampling: float [B T], logprobs under the trainer and the sampler. Truncated importance sampling per token or
    per sequence, or the IcePop band (arXiv 2510.18855). Factors are never renormalised.
    """
    log_ratio = np.where(sampled, np.asarray(old, np.float64) - np.asarray(sampling, np.float64), 0.0)
    match config.type:
        case "none":
            return np.ones_like(log_ratio)
        case "token_tis":
            factor = np.minimum(np.exp(log_ratio), config.cap)
        case "sequence_tis":
            factor = np.exp(np.minimum(sequence_sum(log_ratio, segment_ids), np.log(config.cap)))
        case "icepop":
            ratio = np.exp(log_ratio)
            factor = np.where((ratio >= config.low) & (ratio <= config.high), ratio, 0.0)
    return np.where(sampled, factor, 1.0)
