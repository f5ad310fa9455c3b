"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from safework_jax.layout import ONE_DEVICE, Layout
from safework_jax.models.decoder.text import project
from safework_jax.sharding import ROWS, placement

NORMALISER = "normaliser"  # by which a chunk's log-sum-exp is known to what chooses what is kept
VOCABULARY = "tensor"  # the axis that the table of `safework_jax/sharding.py` splits a head's vocabulary over


class Chunks(NamedTuple):
    """How logits are made: `positions` at one time; `axis` is what the vocabulary is split over."""

    temperature: float
    positions: int
    axis: str | None


def token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    token_ids: jax.Array,
    previous: jax.Array,
    wanted: jax.Array,
    temperature: float,
    layout: Layout = ONE_DEVICE,
) -> tuple[jax.Array, jax.Array]:
    """Logprobs [B T] (differentiable) and entropies [B T] of the wanted tokens, fp32, 0 elsewhere.

    hidden: float [B T D]. weight: [V D]. token_ids: int [B T]. previous: int [B T], the place of the token before: the
    value at t is predicted from there. wanted: bool [B T], False wherever a sequence starts. On a mesh each device
    computes its own rows with its part of the vocabulary, and rows divide over replica and fsdp.
    """
    if layout.mesh is None:
        chunks = Chunks(temperature, layout.logits, None)
        return _local_logprobs(weight, hidden, token_ids, previous, wanted, chunks)

    def local(
        shard: jax.Array, hidden: jax.Array, token_ids: jax.Array, previous: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        whole = _whole_weight(shard, hidden.dtype)
        assert isinstance(whole, jax.Array)
        # Here, so that the gradient of all chunks is summed over the parts of the vocabulary at once.
        hidden = jax.lax.pcast(hidden, VOCABULARY, to="varying")
        chunks = Chunks(temperature, layout.logits, VOCABULARY)
        return _local_logprobs(whole, hidden, token_ids, previous, wanted, chunks)

    by_rows = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(placement("head.weight"), *4 * (ROWS,)), out_specs=(ROWS, ROWS)
    )
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
    chunks: Chunks,
) -> tuple[jax.Array, jax.Array]:
    """The same for the rows of one device.

    Wanted tokens are moved to the front and chunks run along T, so that chunks with nothing wanted are skipped; the
    backward pass computes the logits of a chunk again.
    """
    rows, tokens = hidden.shape[:2]
    width = max(1, min(tokens, chunks.positions // rows))
    rank = jnp.cumsum(wanted, axis=1) - 1
    # Place of each wanted token in turn, without a sort, which the TPU's compiler takes minutes over; then 0.
    aim = jnp.where(wanted, rank, tokens)
    order = jax.vmap(lambda aim: jnp.zeros_like(aim).at[aim].set(jnp.arange(tokens), mode="drop"))(aim)
    ordered = [jnp.take_along_axis(array, order, axis=1) for array in (previous, token_ids)]
    before, targets = (jnp.pad(array, ((0, 0), (0, -tokens % width))) for array in ordered)
    # All devices skip the same chunks: they sum over the vocabulary together.
    most = jnp.sum(wanted, axis=1).max()
    most = most if chunks.axis is None else jax.lax.pmax(most, (*ROWS[0],))

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(NORMALISER))
    def chunk(start: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        before, targets = part

        def chosen() -> tuple[jax.Array, jax.Array]:
            at = jnp.take_along_axis(hidden, before[..., None], 1)
            return _chunk_logprobs(at, targets, weight, chunks.temperature, chunks.axis)

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
    logits = project(hidden, weight)
    first = 0 if axis is None else jax.lax.axis_index(axis) * logits.shape[-1]
    chosen = _chosen(*jax.lax.stop_gradient((hidden, weight)), targets - first)
    return _log_softmax_at(logits, chosen, targets - first, temperature, axis)


def _chosen(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
    """The targets' own logits, fp32 [B C]: in bfloat16 a logit of 20 is rounded by up to 1/16, which would be most of a
    logprob's error.
    """
    rows = jnp.take(weight, targets, axis=0, mode="clip").astype(hidden.dtype)
    return jnp.sum(hidden.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _log_softmax_at(
    logits: jax.Array, chosen: jax.Array, targets: jax.Array, temperature: float, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Logprobs of the targets and entropies, fp32 [B C], of logits [B C V / devices along `axis`], where those of the
    targets count as `chosen`: the gradient goes to the logits. A target that is in another device's part lies outside
    of 0 .. V. The entropies have no gradient.
    """
    return _log_softmax_forward(logits, chosen, targets, temperature, axis)[0]


def _log_softmax_forward(
    logits: jax.Array, chosen: jax.Array, targets: jax.Array, temperature: float, axis: str | None
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    def over_devices(reduce: Callable[[jax.Array, str], jax.Array], part: jax.Array) -> jax.Array:
        return part if axis is None else reduce(part, axis)

    scaled = _wide(logits, chosen, targets) / temperature
    top = over_devices(jax.lax.pmax, scaled.max(axis=-1))
    below = scaled - top[..., None]
    mass = over_devices(jax.lax.psum, jnp.exp(below).sum(axis=-1))
    mean_below = over_devices(jax.lax.psum, (jnp.exp(below) * below).sum(axis=-1)) / mass
    # Picked by comparing: an index would want all of `below` in memory.
    picked = over_devices(jax.lax.psum, jnp.where(_is_target(logits, targets), below, 0.0).sum(axis=-1))
    normaliser = checkpoint_name(top + jnp.log(mass), NORMALISER)
    return (picked - jnp.log(mass), jnp.log(mass) - mean_below), (logits, chosen, targets, normaliser)


def _log_softmax_backward(
    temperature: float, axis: str | None, kept: tuple[jax.Array, ...], upstream: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None, None]:
    logits, chosen, targets, normaliser = kept
    softmax = jnp.exp(_wide(logits, chosen, targets) / temperature - normaliser[..., None])
    # In fp32, before anything is rounded: where a target is nearly certain, little is left of it.
    slope = jnp.where(_is_target(logits, targets), 1.0 - softmax, -softmax) * (upstream[0] / temperature)[..., None]
    return slope.astype(logits.dtype), None, None


_log_softmax_at.defvjp(_log_softmax_forward, _log_softmax_backward)


def _wide(logits: jax.Array, chosen: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.where(_is_target(logits, targets), chosen[..., None], logits.astype(jnp.float32))


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return targets[..., None] == jnp.arange(logits.shape[-1])
