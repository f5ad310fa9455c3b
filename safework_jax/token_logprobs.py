"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Positions of all rows together whose logits exist at one time: 512 x 150k vocabulary x 4 bytes = 0.3 GB.
CHUNK = 512


def token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    token_ids: jax.Array,
    previous: jax.Array,
    wanted: jax.Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Logprobs [B T] (differentiable) and entropies [B T] of the wanted tokens, fp32, 0 elsewhere.

    hidden: float [B T D]. weight: [V D]. token_ids: int [B T]. previous: int [B T], the place of the token before: the
    value at t is predicted from there. wanted: bool [B T], False wherever a sequence starts. Chunks run along T, so
    that rows stay on their devices; the backward pass computes the logits of a chunk again.
    """
    rows, tokens, dim = hidden.shape
    width = max(1, min(tokens, CHUNK // rows))
    padding = -tokens % width
    before = jnp.take_along_axis(hidden, previous[..., None], axis=1)
    before = jnp.pad(before, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(token_ids, ((0, 0), (0, padding)))
    weight = weight.astype(hidden.dtype)

    @jax.checkpoint
    def chunk(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, _chunk_logprobs(*part, weight, temperature)

    parts = (
        before.reshape(rows, -1, width, dim).swapaxes(0, 1),
        targets.reshape(rows, -1, width).swapaxes(0, 1),
    )
    _, (logprobs, entropy) = jax.lax.scan(chunk, None, parts)

    def whole(x: jax.Array) -> jax.Array:
        return jnp.where(wanted, x.swapaxes(0, 1).reshape(rows, -1)[:, :tokens], 0.0)

    return whole(logprobs), whole(jax.lax.stop_gradient(entropy))


def _chunk_logprobs(
    hidden: jax.Array, targets: jax.Array, weight: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """[B C D], [B C] -> logprobs and entropies [B C]."""
    logits = jnp.einsum("bcd,vd->bcv", hidden, weight).astype(jnp.float32)
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    fixed = jax.lax.stop_gradient(logprobs)
    return chosen, -(jnp.exp(fixed) * fixed).sum(axis=-1)
