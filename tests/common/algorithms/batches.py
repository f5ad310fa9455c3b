"""Random packed token arrays for the loss, float64: several segments a row, prompts, padding, old and reference."""

from __future__ import annotations

import numpy as np

from common.algorithms.objective import TokenArrays

ROWS, TOKENS = 3, 12


def token_arrays(seed: int, old: bool = True, ref: bool = True) -> tuple[np.ndarray, np.ndarray, TokenArrays]:
    """(logprobs, entropy, constants), all [ROWS TOKENS].

    Each row holds segments 1 and 2 of random length, the first two tokens of each a prompt, then padding. Ratios reach
    beyond every clip but the widest; no token stands nearer than 1e-3 to an edge of the usual clips, where slopes jump.
    """
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((ROWS, TOKENS), np.int32)
    sampled = np.zeros((ROWS, TOKENS), bool)
    for row in range(ROWS):
        start = 0
        for segment, length in enumerate(rng.integers(3, 6, 2), start=1):
            segment_ids[row, start : start + length] = segment
            sampled[row, start + 2 : start + length] = True
            start += length
    shape = segment_ids.shape
    logprobs = np.where(sampled, rng.uniform(-4.0, -0.5, shape), 0.0)
    log_ratio = rng.choice([-0.6, -0.3, -0.1, 0.05, 0.15, 0.25, 0.7, 1.9], shape) + rng.uniform(-0.01, 0.01, shape)
    sign = rng.choice([-1.0, 1.0], shape)
    advantages = np.where(sampled, sign * rng.uniform(0.2, 2.0, shape), 0.0)
    weights = np.where(sampled, rng.uniform(0.01, 0.1, shape), 0.0)
    arrays = TokenArrays(
        sampled=sampled,
        segment_ids=segment_ids,
        sampling_logprobs=np.where(sampled, logprobs + rng.normal(0.0, 0.1, shape), 0.0),
        advantages=advantages,
        policy_weights=weights,
        kl_weights=np.where(sampled, weights * rng.uniform(0.5, 1.5, shape), 0.0),
        old_logprobs=np.where(sampled, logprobs - log_ratio, 0.0) if old else None,
        ref_logprobs=np.where(sampled, logprobs + rng.normal(0.0, 0.4, shape), 0.0) if ref else None,
    )
    return logprobs, np.where(sampled, rng.uniform(0.0, 3.0, shape), 0.0), arrays
