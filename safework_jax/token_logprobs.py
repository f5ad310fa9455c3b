"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from safework_jax.layout import ONE_DEVICE, Layout
from safework_jax.sharding import ROWS, placement

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
    """The same for the rows of one device, whose wanted tokens are moved to the front."""
    rows, tokens = wanted.shape
    size = min(wanted.size, chunks.positions)
    room = -(-wanted.size // size) * size
    flat = jnp.asarray(wanted).reshape(-1)
    rank = jnp.cumsum(flat) - 1
    # Place of each wanted token in turn, without a sort, which the TPU's compiler takes minutes over; then no place.
    order = jnp.full(room, flat.size).at[jnp.where(flat, rank, room)].set(jnp.arange(flat.size), mode="drop")
    places = previous + tokens * jnp.arange(rows)[:, None]
    before, targets = (
        jnp.take(array, order, mode="fill", fill_value=filling).reshape(-1, size)
        for array, filling in ((places, flat.size), (token_ids, 0))
    )
    # All devices skip the same chunks: they sum over the vocabulary together.
    most = flat.sum()
    most = most if chunks.axis is None else jax.lax.pmax(most, (*ROWS[0],))
    found = _in_chunks(jnp.asarray(hidden).reshape(flat.size, -1), weight, before, targets, most, chunks)
    assert isinstance(found, tuple)
    logprobs, entropy = found

    def in_place(x: jax.Array) -> jax.Array:
        return jnp.where(wanted, x.reshape(-1)[jnp.maximum(rank, 0)].reshape(wanted.shape), 0.0)

    return in_place(logprobs), in_place(entropy)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _in_chunks(
    hidden: jax.Array, weight: jax.Array, before: jax.Array, targets: jax.Array, most: jax.Array, chunks: Chunks
) -> tuple[jax.Array, jax.Array]:
    """Logprobs and entropies [K C] of `targets` int [K C], predicted at the places `before` of hidden states [N D] by
    the head [V D], in K chunks of C, of which those from the `most`-th token on are skipped; a place N is none. The
    entropies have no gradient; the backward pass computes the logits of a chunk again.
    """
    return _in_chunks_forward(hidden, weight, before, targets, most, chunks)[0]


def _in_chunks_forward(
    hidden: jax.Array, weight: jax.Array, before: jax.Array, targets: jax.Array, most: jax.Array, chunks: Chunks
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    narrow = weight.astype(hidden.dtype)  # once for all chunks

    def chunk(start: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        places, own = part

        def some() -> tuple[jax.Array, ...]:
            return _statistics(*_logits(_at(hidden, places), narrow, own, chunks), chunks)

        def none() -> tuple[jax.Array, ...]:
            return (jnp.zeros_like(own, jnp.float32),) * 3

        return start + len(own), jax.lax.cond(start < most, some, none)

    _, (logprobs, entropy, normaliser) = jax.lax.scan(chunk, jnp.zeros_like(most), (before, targets))
    return (logprobs, entropy), (hidden, weight, before, targets, most, normaliser)


def _in_chunks_backward(
    chunks: Chunks, kept: tuple[jax.Array, ...], upstream: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    hidden, weight, before, targets, most, normaliser = kept
    narrow = weight.astype(hidden.dtype)

    def chunk(
        carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        (start, total), (places, own, normaliser, upstream) = carry, part
        at = _at(hidden, places)

        def some(total: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope = _slope(*_logits(at, narrow, own, chunks), normaliser, upstream, chunks.temperature)
            # Added up where it is made, in the dtype of the weight. In this order: a CPU would transpose the slope.
            total += jnp.matmul(at.T, slope, preferred_element_type=total.dtype)
            return total, slope @ narrow

        def none(total: jax.Array) -> tuple[jax.Array, jax.Array]:
            return total, jnp.zeros_like(at)

        total, of_hidden = jax.lax.cond(start < most, some, none, total)
        return (start + len(own), total), of_hidden

    begin = jnp.zeros_like(most), jnp.zeros_like(weight.T)
    (_, of_weight), of_hidden = jax.lax.scan(chunk, begin, (before, targets, normaliser, upstream[0]))
    in_place = jnp.zeros_like(hidden).at[before].add(of_hidden, mode="drop")
    return in_place, of_weight.T, None, None, None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _at(hidden: jax.Array, places: jax.Array) -> jax.Array:
    """Hidden states [N D] at places [C], 0 at the place N: what lies elsewhere may be no number."""
    return hidden.at[places].get(mode="fill", fill_value=0)


def _logits(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, chunks: Chunks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [C V / devices along `chunks.axis`] of hidden states [C D], the targets' own in fp32 [C], and the targets
    as places in this device's part of the vocabulary; those of other parts lie outside of it.
    """
    local = targets if chunks.axis is None else targets - jax.lax.axis_index(chunks.axis) * len(weight)
    return hidden @ weight.T, _chosen(hidden, weight, local), local


def _chosen(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
    """The targets' own logits, fp32 [C]: in bfloat16 a logit of 20 is rounded by up to 1/16, which would be most of a
    logprob's error.
    """
    rows = jnp.take(weight, targets, axis=0, mode="clip")
    return jnp.sum(hidden.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)


def _statistics(logits: jax.Array, chosen: jax.Array, targets: jax.Array, chunks: Chunks) -> tuple[jax.Array, ...]:
    """Logprobs of the targets, entropies and logs of the normalisers, fp32 [C] each, of logits [C V / devices along
    `chunks.axis`], where those of the targets count as `chosen`.
    """

    def over_devices(reduce: Callable[[jax.Array, str], jax.Array], part: jax.Array) -> jax.Array:
        return part if chunks.axis is None else reduce(part, chunks.axis)

    scaled = _wide(logits, chosen, targets) / chunks.temperature
    top = over_devices(jax.lax.pmax, scaled.max(axis=-1))
    below = scaled - top[..., None]
    mass = over_devices(jax.lax.psum, jnp.exp(below).sum(axis=-1))
    mean_below = over_devices(jax.lax.psum, (jnp.exp(below) * below).sum(axis=-1)) / mass
    # Picked by comparing: an index would want all of `below` in memory.
    picked = over_devices(jax.lax.psum, jnp.where(_is_target(logits, targets), below, 0.0).sum(axis=-1))
    return picked - jnp.log(mass), jnp.log(mass) - mean_below, top + jnp.log(mass)


def _slope(
    logits: jax.Array,
    chosen: jax.Array,
    targets: jax.Array,
    normaliser: jax.Array,
    upstream: jax.Array,
    temperature: float,
) -> jax.Array:
    """The gradient at the logits, in their dtype."""
    softmax = jnp.exp(_wide(logits, chosen, targets) / temperature - normaliser[..., None])
    # In fp32, before anything is rounded: where a target is nearly certain, little is left of it.
    slope = jnp.where(_is_target(logits, targets), 1.0 - softmax, -softmax) * (upstream / temperature)[..., None]
    return slope.astype(logits.dtype)


def _wide(logits: jax.Array, chosen: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.where(_is_target(logits, targets), chosen[..., None], logits.astype(jnp.float32))


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return targets[..., None] == jnp.arange(logits.shape[-1])
