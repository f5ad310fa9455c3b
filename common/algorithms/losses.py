"""Policy losses and KL penalties, the differentiable part of the method. Runs on numpy, torch and jax alike.

Everything is per token, [B T] in and [B T] out; `logprobs` carries the gradient, all else is constant. Let
r = exp(logprobs - old_logprobs) and A the advantage.
"""

from __future__ import annotations

import math

from common.arrays import Array, namespace, sequence_sum, stop_gradient
from common.config.method import LossConfig


def ppo_clip(logprobs: Array, old: Array, advantages: Array, clip_low: float, clip_high: float) -> Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347; two bounds: DAPO, 2503.14476)."""
    xp = namespace(logprobs)
    ratio = xp.exp(logprobs - old)
    clipped = xp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -xp.minimum(ratio * advantages, clipped * advantages)


def cpg(logprobs: Array, old: Array, advantages: Array, clip_low: float, clip_high: float) -> Array:
    """-A times the log-probability, held by the clip on the side that A pushes to (CPGD, arXiv 2505.12504)."""
    xp = namespace(logprobs)
    upper = xp.minimum(logprobs, old + math.log1p(clip_high))
    lower = xp.maximum(logprobs, old + math.log1p(-clip_low))
    return -advantages * xp.where(advantages > 0, upper, lower)


def policy_drift(logprobs: Array, old: Array, cap: float) -> Array:
    """min(sg(r) - 1, cap) times the log-probability: gradient of the forward KL from the old policy (2505.12504).

    Its value means nothing; only its gradient is used.
    """
    xp = namespace(logprobs)
    excess = xp.expm1(stop_gradient(logprobs) - old)
    return xp.clip(excess, -1.0, cap) * logprobs


def gspo(
    logprobs: Array,
    old: Array,
    advantages: Array,
    sampled: Array,
    segment_ids: Array,
    clip_low: float,
    clip_high: float,
) -> Array:
    """Clipped loss on the sequence ratio, the geometric mean of its token ratios (GSPO, arXiv 2507.18071).

    The ratio of a whole sequence stands at each of its tokens; each gets its gradient through its own log-probability.
    """
    xp = namespace(logprobs)
    mean = sequence_log_ratio(stop_gradient(logprobs) - old, sampled, segment_ids)
    # The difference first: it is exactly 0, where mean + logprobs would round the mean away.
    log_ratio = mean + (logprobs - stop_gradient(logprobs))
    return ppo_clip(log_ratio, xp.zeros_like(mean), advantages, clip_low, clip_high)


def sequence_log_ratio(log_ratio: Array, sampled: Array, segment_ids: Array) -> Array:
    """Mean of log_ratio over the sampled tokens of each sequence, given to each token of it. [B T] -> [B T]."""
    xp = namespace(log_ratio)
    mask = xp.where(sampled, xp.ones_like(log_ratio), xp.zeros_like(log_ratio))
    count = sequence_sum(mask, segment_ids)
    return sequence_sum(log_ratio * mask, segment_ids) / xp.clip(count, 1.0, math.inf)


def cispo(logprobs: Array, old: Array, advantages: Array, clip_high: float) -> Array:
    """-sg(min(r, 1 + clip_high)) A times the log-probability: no token loses its gradient (arXiv 2506.13585)."""
    xp = namespace(logprobs)
    weight = xp.clip(xp.exp(stop_gradient(logprobs) - old), 0.0, 1.0 + clip_high)
    return -weight * advantages * logprobs


def k1(logprobs: Array, ref: Array) -> Array:
    """log(pi / ref): unbiased value, may be negative. For the reward only: as a loss it has no expected gradient."""
    return logprobs - ref


def k2(logprobs: Array, ref: Array) -> Array:
    """log(pi / ref)^2 / 2: as an on-policy loss, the unbiased gradient of the reverse KL (arXiv 2510.01555)."""
    return 0.5 * (logprobs - ref) ** 2


def k3(logprobs: Array, ref: Array) -> Array:
    """ref / pi - 1 - log(ref / pi) >= 0: GRPO's penalty, with the gradient of the forward KL (arXiv 2402.03300)."""
    xp = namespace(logprobs)
    return xp.expm1(ref - logprobs) - (ref - logprobs)


def rho_k3(logprobs: Array, ref: Array, sampling: Array) -> Array:
    """k3 times pi / mu with gradient, mu the sampler: unbiased reverse KL on and off policy (arXiv 2512.02556)."""
    xp = namespace(logprobs)
    return xp.exp(logprobs - sampling) * k3(logprobs, ref)


def policy_loss(
    config: LossConfig, logprobs: Array, old: Array, advantages: Array, sampled: Array, segment_ids: Array
) -> Array:
    """The configured policy loss per token, [B T]. `sampled` bool and `segment_ids` int matter to `gspo` alone."""
    low, high = config.clip_low, config.clip_high
    match config.type:
        case "ppo_clip":
            return ppo_clip(logprobs, old, advantages, low, high)
        case "cpg":
            return cpg(logprobs, old, advantages, low, high)
        case "cpgd":
            drift = policy_drift(logprobs, old, config.drift_cap)
            return cpg(logprobs, old, advantages, low, high) + config.drift_coef * drift
        case "gspo":
            return gspo(logprobs, old, advantages, sampled, segment_ids, low, high)
        case "cispo":
            return cispo(logprobs, old, advantages, high)
        case "cross_entropy":
            return -logprobs


def kl_penalty(config: LossConfig, logprobs: Array, ref: Array, sampling: Array) -> Array:
    """The configured KL penalty per token, [B T]; `k1_reward` is no loss and is applied to the advantages instead."""
    match config.kl_type:
        case "k2_loss":
            return k2(logprobs, ref)
        case "k3_loss":
            return k3(logprobs, ref)
        case "rho_k3_loss":
            return rho_k3(logprobs, ref, sampling)
        case _:
            raise AssertionError(f"{config.kl_type} is not a loss")
