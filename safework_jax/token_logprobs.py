"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from safework_jax.models.decoder.text import project

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
    value at t is predicted from there. wanted: bool [B T], False wherever a sequence starts. Wanted tokens are moved to
    the front and chunks run along T, so that rows stay on their devices and chunks with nothing wanted are skipped; the
    backward pass computes the logits of a chunk again.
    """
    rows, tokens = hidden.shape[:2]
    width = max(1, min(tokens, CHUNK // rows))
    order = jnp.argsort(~wanted, axis=1, stable=True)
    ordered = [jnp.take_along_axis(array, order, axis=1) for array in (previous, token_ids, wanted)]
    before, targets, live = (jnp.pad(array, ((0, 0), (0, -tokens % width))) for array in ordered)

    @jax.checkpoint
    def chunk(_: None, part: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        before, targets, live = part

        def chosen() -> tuple[jax.Array, jax.Array]:
            at = jnp.take_along_axis(hidden, before[..., None], 1)
            # Cast here, so that the chunks' gradients are summed in the weight's own dtype.
            return _chunk_logprobs(at, targets, weight.astype(hidden.dtype), temperature)

        def nothing() -> tuple[jax.Array, jax.Array]:
            return jnp.zeros((rows, width)), jnp.zeros((rows, width))

        return None, jax.lax.cond(live.any(), chosen, nothing)

    parts = tuple(array.reshape(rows, -1, width).swapaxes(0, 1) for array in (before, targets, live))
    _, (logprobs, entropy) = jax.lax.scan(chunk, None, parts)
    rank = jnp.cumsum(wanted, axis=1) - 1

    def in_place(x: jax.Array) -> jax.Array:
        whole = x.swapaxes(0, 1).reshape(rows, -1)
        return jnp.where(wanted, jnp.take_along_axis(whole, jnp.maximum(rank, 0), axis=1), 0.0)

    return in_place(logprobs), in_place(jax.lax.stop_gradient(entropy))


def _chunk_logprobs(
    hidden: jax.Array, targets: jax.Array, weight: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """[B C D], [B C] -> logprobs and entropies [B C]."""
    logits = project(hidden, weight).astype(jnp.float32)
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    fixed = jax.lax.stop_gradient(logprobs)
    return chosen, -(jnp.exp(fixed) * fixed).sum(axis=-1)
