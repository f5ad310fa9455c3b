"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from safework_jax.models.decoder.text import project
from safework_jax.sharding import ROWS, placement

VOCABULARY = "tensor"  # the axis that the table of `safework_jax/sharding.py` splits a head's vocabulary over

# Positions of one device's rows whose logits exist at one time: 512 x 150k vocabulary x 4 bytes = 0.3 GB.
CHUNK = 512


def token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    token_ids: jax.Array,
    previous: jax.Array,
    wanted: jax.Array,
    temperature: float,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Logprobs [B T] (differentiable) and entropies [B T] of the wanted tokens, fp32, 0 elsewhere.

    hidden: float [B T D]. weight: [V D]. token_ids: int [B T]. previous: int [B T], the place of the token before: the
    value at t is predicted from there. wanted: bool [B T], False wherever a sequence starts. On a mesh each device
    computes its own rows with its part of the vocabulary, and rows divide over replica and fsdp.
    """
    if mesh is None:
        return _local_logprobs(weight, hidden, token_ids, previous, wanted, temperature, None)

    def local(
        shard: jax.Array, hidden: jax.Array, token_ids: jax.Array, previous: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        whole = _whole_weight(shard, hidden.dtype)
        assert isinstance(whole, jax.Array)
        # Here, so that the gradient of all chunks is summed over the parts of the vocabulary at once.
        hidden = jax.lax.pcast(hidden, VOCABULARY, to="varying")
        return _local_logprobs(whole, hidden, token_ids, previous, wanted, temperature, VOCABULARY)

    by_rows = jax.shard_map(local, mesh=mesh, in_specs=(placement("head.weight"), *4 * (ROWS,)), out_specs=(ROWS, ROWS))
    return by_rows(weight, hidden, token_ids, previous, wanted)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole_weight(shard: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A device's part of the vocabulary [V D], whole along D, as it differs for each of its row shares.

    Gathered once for all chunks, rounded to dtype; its gradient is summed over the devices once, in its own dtype.
    """
    whole = jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=1, tiled=True).astype(shard.dtype)
    return jax.lax.pcast(whole, "replica", to="varying")


def _whole_weight_forward(shard: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, None]:
    return _whole_weight(shard, dtype), None


def _whole_weight_backward(dtype: DTypeLike, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum(jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=1, tiled=True), "replica"),)


_whole_weight.defvjp(_whole_weight_forward, _whole_weight_backward)


def _local_logprobs(
    weight: jax.Array,
    hidden: jax.Array,
    token_ids: jax.Array,
    previous: jax.Array,
    wanted: jax.Array,
    temperature: float,
    axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The same for the rows of one device; `axis` is what the vocabulary of `weight` is split over.

    Wanted tokens are moved to the front and chunks run along T, so that chunks with nothing wanted are skipped; the
    backward pass computes the logits of a chunk again.
    """
    rows, tokens = hidden.shape[:2]
    width = max(1, min(tokens, CHUNK // rows))
    rank = jnp.cumsum(wanted, axis=1) - 1
    # Place of each wanted token in turn, without a sort, which the TPU's compiler takes minutes over; then 0.
    aim = jnp.where(wanted, rank, tokens)
    order = jax.vmap(lambda aim: jnp.zeros_like(aim).at[aim].set(jnp.arange(tokens), mode="drop"))(aim)
    ordered = [jnp.take_along_axis(array, order, axis=1) for array in (previous, token_ids)]
    before, targets = (jnp.pad(array, ((0, 0), (0, -tokens % width))) for array in ordered)
    # All devices skip the same chunks: they sum over the vocabulary together.
    most = jnp.sum(wanted, axis=1).max()
    most = most if axis is None else jax.lax.pmax(most, (*ROWS[0],))

    @jax.checkpoint
    def chunk(start: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        before, targets = part

        def chosen() -> tuple[jax.Array, jax.Array]:
            at = jnp.take_along_axis(hidden, before[..., None], 1)
            return _chunk_logprobs(at, targets, weight, temperature, axis)

        def nothing() -> tuple[jax.Array, jax.Array]:
            none = jnp.zeros_like(targets, jnp.float32)
            return none, none

        return start + width, jax.lax.cond(start < most, chosen, nothing)

    parts = tuple(array.reshape(rows, -1, width).swapaxes(0, 1) for array in (before, targets))
    _, (logprobs, entropy) = jax.lax.scan(chunk, jnp.zeros((), most.dtype), parts)

    def in_place(x: jax.Array) -> jax.Array:
        whole = x.swapaxes(0, 1).reshape(rows, -1)
        return jnp.where(wanted, jnp.take_along_axis(whole, jnp.maximum(rank, 0), axis=1), 0.0)

    return in_place(logprobs), in_place(jax.lax.stop_gradient(entropy))


def _chunk_logprobs(
    hidden: jax.Array, targets: jax.Array, weight: jax.Array, temperature: float, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """[B C D], [B C] -> logprobs and entropies [B C]."""
    logits = project(hidden, weight).astype(jnp.float32)
    if temperature != 1.0:
        logits = logits / temperature
    if axis is None:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        fixed = jax.lax.stop_gradient(logprobs)
        return chosen, -(jnp.exp(fixed) * fixed).sum(axis=-1)
    return _split_logprobs(logits, targets, axis)


def _split_logprobs(logits: jax.Array, targets: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Where each device has the logits [B C V/n] of its part of the vocabulary."""
    highest = jax.lax.pmax(jax.lax.stop_gradient(logits).max(axis=-1), axis)
    shifted = logits - highest[..., None]
    normaliser = jnp.log(jax.lax.psum(jnp.exp(shifted).sum(axis=-1), axis))
    place = targets - jax.lax.axis_index(axis) * logits.shape[-1]
    here = (place >= 0) & (place < logits.shape[-1])
    picked = jnp.take_along_axis(shifted, jnp.where(here, place, 0)[..., None], axis=-1)[..., 0]
    chosen = jax.lax.psum(jnp.where(here, picked, 0.0), axis) - normaliser
    fixed = jax.lax.stop_gradient(shifted - normaliser[..., None])
    return chosen, -jax.lax.psum((jnp.exp(fixed) * fixed).sum(axis=-1), axis)
