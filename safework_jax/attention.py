"""Attention of packed rows: the masked reference, splash attention on TPU, and cuDNN on GPU.

Letters: B rows, T tokens, S keys, H query heads, K key heads. A token sees the tokens before it of its own segment, or
of the segment of its prefix, that are less than `window` positions behind. All three give the same mixed values; the
kernels serve rows without shared prompts and windows (`safework_jax/layout.py` chooses).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

# Rows and columns of scores that splash attention holds at one time; the most that divides the row.
SPLASH_BLOCKS = (512, 256, 128)


class KeyValues(NamedTuple):
    """What attention remembers of tokens: keys and values, each [... KV heads, S, head_dim]."""

    keys: jax.Array
    values: jax.Array


class Packing(NamedTuple):
    """Who is who in packed rows: int [B T] each, as in TrainBatch."""

    positions: jax.Array
    segment_ids: jax.Array
    prefix_ids: jax.Array


def visible_tokens(packing: Packing, window: jax.Array) -> jax.Array:
    """Who sees whom: window [] -> bool [B T S], True where token t may attend to token s.

    Always itself, so that no row of scores is empty: padding, segment 0, sees padding.
    """
    positions, segment_ids, prefix_ids = packing
    index = jnp.arange(positions.shape[1])
    earlier = index[:, None] >= index
    keys = segment_ids[:, None, :]
    seen = (segment_ids[:, :, None] == keys) | (prefix_ids[:, :, None] == keys)
    near = positions[:, :, None] - positions[:, None, :] < window
    return earlier & seen & near


def masked_attention(query: jax.Array, remembered: KeyValues, visible: jax.Array) -> jax.Array:
    """The masked reference: query [B T heads head_dim], keys [B KV S head_dim], visible [B T S] -> shape of query.

    Heads that share a key head stay together as one matrix product; scores and softmax are float32. As in the kernels,
    weights are rounded before they are divided by their sum.
    """
    keys, values = remembered
    grouped = query.reshape(*query.shape[:2], keys.shape[1], -1, query.shape[-1])
    # Moved before the product, for which XLA would else move the far larger scores.
    grouped = jnp.moveaxis(grouped, 1, 3)
    scores = jnp.einsum("bkgtd,bksd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    rounded = weights.astype(values.dtype)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", rounded, values, preferred_element_type=jnp.float32)
    mixed = (mixed / weights.sum(axis=-1)[..., None]).astype(values.dtype)
    return jnp.moveaxis(mixed, 3, 1).reshape(query.shape)


def splash_attention(
    query: jax.Array, remembered: KeyValues, segment_ids: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Pallas splash attention: query [B T H head_dim], keys [B K T head_dim], segment ids int [B T] -> shape of query.

    The kernel has no scale of its own, so queries are scaled before it, which rounds them once more in bfloat16 where
    the root of head_dim is no power of two. interpret: run the kernel's own steps without a TPU.
    """
    tokens = query.shape[1]
    missing = -tokens % SPLASH_BLOCKS[-1]
    # What fills up the last block is a segment of its own, behind all others.
    segments = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=-1)
    scaled = jnp.pad(query.swapaxes(1, 2) * query.shape[-1] ** -0.5, ((0, 0), (0, 0), (0, missing), (0, 0)))
    keys, values = (jnp.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0))) for array in remembered)

    def run(query: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
        kernel = _splash_kernel(query.shape[2], query.shape[1], interpret)
        return jax.vmap(kernel)(query, keys, values, splash.SegmentIds(segments, segments))

    mixed = _in_own_precision(run, scaled, keys, values, segments)
    return mixed[:, :, :tokens].swapaxes(1, 2)


def _in_own_precision(run: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A kernel of arrays, the last of which are segment ids, forward and backward; where it computes in bfloat16,
    without the precision that the run asks for fp32 products: the compiler of TPU kernels refuses the two together.
    """
    if arrays[0].dtype == jnp.float32:
        return run(*arrays)

    @jax.custom_vjp
    def plain(*arrays: jax.Array) -> jax.Array:
        return forward(*arrays)[0]

    def forward(*arrays: jax.Array) -> tuple[jax.Array, Callable[..., Any]]:
        *differing, segments = arrays
        with jax.default_matmul_precision("default"):
            return jax.vjp(lambda *differing: run(*differing, segments), *differing)

    def backward(pull: Callable[..., Any], gradient: jax.Array) -> Any:
        with jax.default_matmul_precision("default"):
            return *pull(gradient), None

    plain.defvjp(forward, backward)
    return plain(*arrays)


def _splash_kernel(tokens: int, heads: int, interpret: bool) -> Callable[..., Any]:
    block = next(size for size in SPLASH_BLOCKS if tokens % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((tokens, tokens))] * heads)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def cudnn_attention(query: jax.Array, remembered: KeyValues, segment_ids: jax.Array, most_segments: int) -> jax.Array:
    """cuDNN's attention over packed rows, float16 or bfloat16: query [B T H head_dim], keys [B K T head_dim], segment
    ids int [B T] -> shape of query.

    most_segments: at least as many as any row holds, padding counted; the caller must know, because a segment beyond
    them would be attended to as if it belonged to none. 1 is a sequence from the start of each row and then padding,
    which nothing before it sees and which may see that sequence: plain causal attention, the fastest.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    packing: dict[str, Any] = {"mask_type": MaskType.CAUSAL}
    if most_segments > 1:
        lengths, offsets = _segments(segment_ids, most_segments)
        packing = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
        packing["mask_type"] = MaskType.PADDING_CAUSAL
    keys, values = (array.swapaxes(1, 2) for array in remembered)
    mixed = dot_product_attention(query, keys, values, scale=query.shape[-1] ** -0.5, **packing)
    assert isinstance(mixed, jax.Array)
    return mixed


def _segments(segment_ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B M] and starts [B M+1] of each row's segments, in tokens, -1 behind the last; int32, as cuDNN reads."""
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    index = jnp.cumsum(begins, axis=1) - 1
    lengths = jax.vmap(functools.partial(jnp.bincount, length=most + 1))(index)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    lengths, starts = (jnp.where(lengths > 0, array, -1).astype(jnp.int32) for array in (lengths, starts))
    return lengths[:, :most], starts
