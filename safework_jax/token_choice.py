"""From logits and one uniform number a row to a token and its log-probability, by inverse CDF."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from common.trainer import Sampling

# The CDF is summed in two levels, blocks first: faster than one long cumulative sum, and rounding grows less.
BLOCK = 256


def choose(logits: jax.Array, uniforms: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """logits: float32 [R V], uniforms: float32 [R] -> token ids int32 [R], logprobs float32 [R].

    The logprob is that of the softmax at the temperature, before top-k and top-p; greedy choice reports it at 1.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    if sampling.temperature == 0:
        chosen = logits.argmax(axis=-1)
    else:
        probabilities = jnp.exp(logits - normaliser[:, None])
        chosen = inverse_cdf(truncated(probabilities, sampling.top_k, sampling.top_p), uniforms)
    return chosen.astype(jnp.int32), jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - normaliser


def truncated(probabilities: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Zero outside the top_k largest and outside the smallest set that reaches top_p; not renormalised. [R V]."""
    if top_k == 0 and top_p == 1.0:
        return probabilities
    index = jnp.argsort(-probabilities, axis=-1, stable=True)
    ordered = jnp.take_along_axis(probabilities, index, axis=-1)
    # A token stays while what stands before it has not reached top_p; the first always stays.
    keep = (ordered.cumsum(axis=-1) - ordered < top_p).at[:, 0].set(True)
    if top_k > 0:
        keep = keep.at[:, top_k:].set(False)
    rows = jnp.arange(len(probabilities))[:, None]
    return jnp.zeros_like(probabilities).at[rows, index].set(ordered * keep)


def inverse_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Index of the token in which u times the total falls, in vocabulary order. weights >= 0: [R V] -> int [R]."""
    rows, vocabulary = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocabulary % BLOCK))).reshape(rows, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    ends = sums.cumsum(axis=-1)
    target = uniforms * ends[:, -1]
    block = jnp.minimum((ends <= target[:, None]).sum(axis=-1), _last_positive(sums))
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.minimum((inside.cumsum(axis=-1) <= (target - before)[:, None]).sum(axis=-1), _last_positive(inside))
    return block * BLOCK + place


def _last_positive(weights: jax.Array) -> jax.Array:
    """Index of each row's last entry above 0: where rounding pushes past the end, the choice stays possible."""
    return weights.shape[-1] - 1 - (weights[:, ::-1] > 0).argmax(axis=-1)
