"""Cached decoding for the embedded sampler: each prompt runs once, then every row grows by one token a step.

    last, prompts = prefill(config, params, token_ids, lengths, compute_dtype=...)     # P prompts, all at once
    cache = tuple(expand_layer(prompts, i, prompt_index, num_slots) for i in ...)      # R rows, G of them to a prompt
    layers = unstack_layers(params)                                                    # once for many steps
    hidden, cache = decode(config, params, layers, token_ids, positions, cache)        # one token for each row

Rows are ragged: the token at position p of a row lives in slot p of its cache, and a row sees its slots up to its
newest token. What lies beyond, such as the padding of a shorter prompt, is overwritten before it is seen.

Letters: P prompts, R rows, S prompt tokens or cache slots, D model width, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from safework_jax.attention import KeyValues, Packing, masked_attention
from safework_jax.layout import ONE_DEVICE, Layout
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.text import Attend, Params, bind, rotation_at, run_layers

# One KeyValues [R KV heads, S, head_dim] per layer.
Cache = tuple[KeyValues, ...]


def prefill(
    config: DecoderConfig,
    params: Params,
    token_ids: jax.Array,
    lengths: jax.Array,
    *,
    compute_dtype: DTypeLike,
    layout: Layout = ONE_DEVICE,
) -> tuple[jax.Array, KeyValues]:
    """Run prompts [P S], right-padded to S, of `lengths` [P].

    Returns the final-normed hidden state of each prompt's last token [P D] and its keys and values
    [L P KV S head_dim].
    """
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    packing = Packing(positions, segment_ids, segment_ids)
    x, prompts = run_layers(
        config, params, token_ids, packing, layout=layout, keep=True, remat="none", compute_dtype=compute_dtype
    )
    assert prompts is not None
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0], prompts


def expand_layer(prompts: KeyValues, layer: jax.Array | int, prompt_index: jax.Array, num_slots: int) -> KeyValues:
    """Give each row its prompt's cache of one layer, `prompt_index` [R], with room for `num_slots` tokens in all."""
    prompt_slots = prompts.keys.shape[3]
    free = num_slots - prompt_slots
    if free < 0:
        raise ValueError(f"num_slots = {num_slots}: the cache must hold at least the prompts' {prompt_slots} tokens.")
    return KeyValues(*(jnp.pad(x[layer][prompt_index], ((0, 0), (0, 0), (0, free), (0, 0))) for x in prompts))


def unstack_layers(params: Params) -> tuple[dict[str, Any], ...]:
    """The blocks' parameters, one tree per layer.

    Decoding reads every weight for a handful of tokens. On a CPU, cutting a layer out of the stack at each step costs
    as much as its products (SmolLM2-135M, 16 rows: 80 tokens/s scanned, 180 with layers apart), so it is done once.
    """
    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers))


def decode(
    config: DecoderConfig,
    params: Params,
    layers: tuple[dict[str, Any], ...],
    token_ids: jax.Array,
    positions: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Append one token to every row: token ids [R] at positions [R] -> (final-normed hidden states [R D], cache).

    Computes in the dtype of the cache. Donate the cache to jit, so that it is updated in place.
    """
    decoder = bind(config, params)
    structure = nnx.split(decoder.layers)[0]
    rotation = rotation_at(config.rope, positions[:, None])
    rows = jnp.arange(positions.shape[0])
    age = positions[:, None] - jnp.arange(cache[0].keys.shape[2])

    def attend_with(past: KeyValues, window: int) -> Attend:
        def attend(query: jax.Array, new: KeyValues) -> tuple[jax.Array, KeyValues]:
            slots = KeyValues(*(old.at[rows, :, positions].set(x[:, :, 0]) for old, x in zip(past, new, strict=True)))
            visible = (age >= 0) & (age < window)
            return masked_attention(query, slots, visible[:, None]), slots

        return attend

    x = decoder.embed(token_ids[:, None], cache[0].keys.dtype)
    grown = []
    for layer, past, window in zip(layers, cache, config.windows, strict=True):
        x, slots = nnx.merge(structure, layer)(x, rotation, attend_with(past, window))
        grown.append(slots)
    return decoder.norm(x[:, 0], x.dtype), tuple(grown)
