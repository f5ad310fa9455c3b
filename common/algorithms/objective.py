"""The scalar that a backend differentiates and the statistics that it reports, from one micro-batch."""

from __future__ import annotations

from typing import NamedTuple

from common.algorithms.losses import k1, kl_penalty, policy_loss, sequence_log_ratio
from common.arrays import Array, namespace, stop_gradient
from common.config.method import LossConfig


class TokenArrays(NamedTuple):
    """The constant inputs of the loss, [B T], as in `TrainBatch`; old and ref are None where not needed."""

    sampled: Array
    segment_ids: Array
    sampling_logprobs: Array
    advantages: Array
    policy_weights: Array
    kl_weights: Array
    old_logprobs: Array | None
    ref_logprobs: Array | None


class Sums(NamedTuple):
    """Statistics of a micro-batch. All but `ratio_max` add up over micro-batches and devices; that one is a maximum.

    entropy is a sum over trained tokens (policy weight not 0), `tokens` of them, `clipped` of which are held by the
    clip; ratio_max is 0 where there are none. mismatch_kl is one over all `sampled` tokens, so that an importance
    correction hides nothing by setting weights to 0. loss_kl already carries its coefficient.
    """

    loss_policy: Array
    loss_kl: Array
    entropy: Array
    mismatch_kl: Array
    clipped: Array
    tokens: Array
    sampled: Array
    ratio_max: Array


def objective(config: LossConfig, logprobs: Array, entropy: Array, arrays: TokenArrays) -> tuple[Array, Sums]:
    """Weighted policy loss plus weighted KL, as a scalar to differentiate, with its statistics.

    logprobs [B T] carries the gradient, entropy [B T] does not. Nothing is divided here: weights hold every
    denominator, so micro-batches and devices simply add.
    """
    xp = namespace(logprobs)
    fixed = stop_gradient(logprobs)
    old = fixed if arrays.old_logprobs is None else arrays.old_logprobs
    advantages = arrays.advantages
    loss_kl = xp.zeros_like(logprobs).sum()
    if arrays.ref_logprobs is not None and config.kl_type == "k1_reward":
        advantages = advantages - config.kl_coef * k1(old, arrays.ref_logprobs)
    elif arrays.ref_logprobs is not None:
        penalty = kl_penalty(config, logprobs, arrays.ref_logprobs, arrays.sampling_logprobs)
        loss_kl = config.kl_coef * (arrays.kl_weights * penalty).sum()
    losses = policy_loss(config, logprobs, old, advantages, arrays.sampled, arrays.segment_ids)
    loss_policy = (arrays.policy_weights * losses).sum()

    trained = _ones_where(arrays.policy_weights != 0, fixed)
    log_ratio = fixed - old
    sampled = _ones_where(arrays.kl_weights != 0, fixed)
    # Where the sampler's own logprobs stand in for the old ones, only the policy's of now can differ from them.
    mismatch = (arrays.sampling_logprobs - (fixed if config.old_logprobs == "sampler" else old)) * sampled
    sums = Sums(
        loss_policy=stop_gradient(loss_policy),
        loss_kl=stop_gradient(loss_kl),
        entropy=(stop_gradient(entropy) * trained).sum(),
        mismatch_kl=((xp.expm1(-mismatch) + mismatch) * sampled).sum(),
        clipped=(_clipped(config, log_ratio, advantages, arrays) * trained).sum(),
        tokens=trained.sum(),
        sampled=sampled.sum(),
        ratio_max=(xp.exp(log_ratio * trained) * trained).max(),
    )
    return loss_policy + loss_kl, sums


def _clipped(config: LossConfig, log_ratio: Array, advantages: Array, arrays: TokenArrays) -> Array:
    """1.0 where the clip holds a token back, else 0.0. [B T]."""
    xp = namespace(log_ratio)
    if config.type == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, arrays.sampled, arrays.segment_ids)
    ratio = xp.exp(log_ratio)
    above = ratio > 1.0 + config.clip_high
    below = ratio < 1.0 - config.clip_low
    match config.type:
        case "cross_entropy":
            held = ratio < 0.0
        case "cispo":
            held = above
        case _:
            held = (above & (advantages > 0)) | (below & (advantages < 0))
    return _ones_where(held, ratio)


def _ones_where(mask: Array, like: Array) -> Array:
    """1.0 where the mask holds, else 0.0, in the shape and dtype of `like`."""
    xp = namespace(like)
    return xp.where(mask, xp.ones_like(like), xp.zeros_like(like))


def add_sums(left: Sums, right: Sums) -> Sums:
    """Statistics of two micro-batches as one: sums add, the ratio's maximum is the larger."""
    added = Sums(*(a + b for a, b in zip(left, right, strict=True)))
    return added._replace(ratio_max=namespace(left.ratio_max).maximum(left.ratio_max, right.ratio_max))


def update_record(sums: Sums, grad_norm: float) -> dict[str, float]:
    """The metrics of one update from its statistics."""
    tokens = max(sums.tokens, 1.0)
    return {
        "loss/policy": sums.loss_policy,
        "loss/kl": sums.loss_kl,
        "policy/entropy": sums.entropy / tokens,
        "policy/ratio_max": sums.ratio_max,
        "policy/clip_fraction": sums.clipped / tokens,
        "mismatch/kl": sums.mismatch_kl / max(sums.sampled, 1.0),
        "mismatch/cut_fraction": (sums.sampled - sums.tokens) / max(sums.sampled, 1.0),
        "grad_norm": grad_norm,
        "tokens/trained": sums.tokens,
    }
