"""The decoder: its modules, which define parameters and names, and the forward pass over packed rows.

Modules are Flax NNX and are split once: what is trained, sharded and saved is a plain nested dict of arrays in which
the parameters of all blocks are stacked, [L ...]. The functions here are pure; the blocks run under one `lax.scan`.

Letters: B rows, T tokens, D model width, V vocabulary, L layers, S keys. Weights are [out in], as Hugging Face does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from safework_jax.attention import KeyValues, Packing
from safework_jax.layout import ONE_DEVICE, Layout
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.rope import Rope

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]

# What computes attention on a TPU or a GPU, whose work is products too.
_KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")


def _is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _KERNELS


_policies = jax.checkpoint_policies
# Element-wise work is always done again: to write and read it takes longer. A product with batch dimensions is the
# masked reference's, as large as the square of a row.
_REMAT_POLICIES = {
    "none": _policies.save_from_both_policies(_policies.dots_saveable, _is_kernel),
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _is_kernel),
    "full": _policies.nothing_saveable,
}


class Rotation(NamedTuple):
    """Cosine and sine of every token's rotary angles, float32 [... head_dim/2]."""

    cos: jax.Array
    sin: jax.Array


# (query [B T heads head_dim], keys and values of the same tokens) -> (mixed values, what the caller keeps of them)
Attend = Callable[[jax.Array, KeyValues], tuple[jax.Array, Any]]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class Embedding(nnx.Module):
    """A vector per token."""

    def __init__(self, vocab_size: int, dim: int, rngs: nnx.Rngs) -> None:
        self.weight = _normal(rngs, (vocab_size, dim))

    def __call__(self, token_ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        """[B T] -> [B T D], in the dtype that everything after computes in."""
        return self.weight[...][token_ids].astype(dtype)


@jax.custom_vjp
def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x W^T in the dtype of x: [... in], [out in] -> [... out].

    With a gradient rule of its own, for two reasons. The weight's gradient leaves its product in the dtype of the
    weight, so that devices sum it in fp32 whatever they compute in. And the order of that product: left to itself, XLA
    on a CPU transposes the output's gradient, computed anew in that order; transposing x is several times faster.
    """
    return _product(x, weight)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight.astype(x.dtype).T


def _project_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not by `project`: what to keep for the backward pass is chosen by primitives, and one with a rule of its own hides
    # the product.
    return _product(x, weight), (x, weight)


def _project_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    rows, columns = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    of_weight = jnp.matmul(rows.T, columns, preferred_element_type=weight.dtype).T
    return gradient @ weight.astype(x.dtype), of_weight


project.defvjp(_project_forward, _project_backward)


def rounded(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Parameters as a pass that computes in dtype has them, in float32; their gradient comes back as it is."""
    wide, info = weight.astype(jnp.float32), jnp.finfo(dtype)
    found = jax.lax.reduce_precision(wide, info.nexp, info.nmant)  # XLA would leave out two casts
    return wide + jax.lax.stop_gradient(found - wide)  # exactly what was found


class Linear(nnx.Module):
    """x W^T + b, in the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight = _normal(rngs, (out_dim, in_dim))
        self.bias = nnx.Param(jnp.zeros(out_dim)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[... in] -> [... out]"""
        y = project(x, self.weight[...])
        return y if self.bias is None else (y + rounded(self.bias[...], x.dtype)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Vectors scaled to mean square 1 and weighted, computed in float32 and rounded once."""

    def __init__(self, dim: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """[... dim] -> [... dim] in dtype, that of the pass"""
        wide = x.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (rounded(self.weight[...], dtype) * unit).astype(dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; which tokens see which is the caller's `attend`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        query_dim, key_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = Linear(config.hidden_dim, query_dim, config.qkv_bias, rngs)
        self.key = Linear(config.hidden_dim, key_dim, config.qkv_bias, rngs)
        self.value = Linear(config.hidden_dim, key_dim, config.qkv_bias, rngs)
        self.output = Linear(query_dim, config.hidden_dim, config.output_bias, rngs)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.query_key_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.query_key_norm else None

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Attend) -> tuple[jax.Array, Any]:
        """x [B T D] -> ([B T D], what `attend` keeps)"""
        query, key, value = (
            linear(x).reshape(*x.shape[:-1], -1, self.head_dim) for linear in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query, x.dtype), self.key_norm(key, x.dtype)
        new = KeyValues(rotate(key, rotation).swapaxes(-3, -2), value.swapaxes(-3, -2))
        mixed, kept = attend(rotate(query, rotation), new)
        return self.output(mixed.reshape(*x.shape[:-1], -1)), kept


class MLP(nnx.Module):
    """The gated feed-forward part."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.gate = Linear(config.hidden_dim, config.mlp_dim, config.mlp_bias, rngs)
        self.up = Linear(config.hidden_dim, config.mlp_dim, config.mlp_bias, rngs)
        self.down = Linear(config.mlp_dim, config.hidden_dim, config.mlp_bias, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B T D] -> [B T D]"""
        gate, up = (linear(x).astype(jnp.float32) for linear in (self.gate, self.up))
        return self.down((jax.nn.silu(gate) * up).astype(x.dtype))


class Block(nnx.Module):
    """One layer: attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Attend) -> tuple[jax.Array, Any]:
        """x [B T D] -> ([B T D], what `attend` keeps)"""
        mixed, kept = self.attention(self.attention_norm(x, x.dtype), rotation, attend)
        # Not rounded in the middle, where nothing is kept: compiled torch does not round there either.
        middle = x.astype(jnp.float32) + mixed.astype(jnp.float32)
        added = self.mlp(self.mlp_norm(middle, x.dtype))
        return (middle + added.astype(jnp.float32)).astype(x.dtype), kept


class Decoder(nnx.Module):
    """Everything that has parameters. `layers` is one Block whose parameters have a leading layer dimension."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.embed = Embedding(config.vocab_size, config.hidden_dim, rngs)
        stack = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(functools.partial(Block, config)))
        self.layers = stack(rngs)
        self.norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.head = None if config.tied_embeddings else Linear(config.hidden_dim, config.vocab_size, False, rngs)


@functools.cache
def _structure(config: DecoderConfig) -> nnx.GraphDef[Decoder]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[0]


def bind(config: DecoderConfig, params: Params) -> Decoder:
    """The modules with these parameters in them; free inside jit, where it only happens while tracing."""
    return nnx.merge(_structure(config), params)


def init_params(config: DecoderConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    """Random parameters: weights normal with deviation 0.02, norms 1, biases 0."""
    params = nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def head_weight(config: DecoderConfig, params: Params) -> jax.Array:
    """The matrix that turns hidden states into logits, [V D]."""
    return params["embed" if config.tied_embeddings else "head"]["weight"]


def next_logits(config: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Hidden states [P D] -> the logits of the tokens after them, fp32 [P V], not rounded to their dtype."""
    weight = head_weight(config, params).astype(hidden.dtype)
    return jnp.matmul(hidden, weight.T, preferred_element_type=jnp.float32)


def rotation_at(rope: Rope, positions: jax.Array) -> Rotation:
    """positions [...] -> the rotation of each, float32 whatever the compute dtype: bfloat16 cannot count to 257."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)
    return Rotation(rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn each pair (i, i + head_dim/2) of every head: [... heads head_dim] -> the same shape and dtype."""
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def run_layers(
    config: DecoderConfig,
    params: Params,
    token_ids: jax.Array,
    packing: Packing,
    *,
    layout: Layout,
    keep: bool,
    remat: Remat,
    compute_dtype: DTypeLike,
) -> tuple[jax.Array, KeyValues | None]:
    """Embed packed rows [B T] and run all blocks over them.

    Returns the hidden states after the final norm [B T D] and, with `keep`, every layer's keys and values
    [L B KV T head_dim].
    """
    outer = {name: layout.opened(name, params[name], compute_dtype) for name in ("embed", "norm")}
    decoder = bind(config, {**params, **outer})
    structure = nnx.split(decoder.layers)[0]
    rotation = rotation_at(config.rope, packing.positions)

    def run_block(x: jax.Array, layer: tuple[Params, jax.Array]) -> tuple[jax.Array, KeyValues | None]:
        own, window = layer

        def attend(query: jax.Array, new: KeyValues) -> tuple[jax.Array, KeyValues | None]:
            kept = jax.tree.map(layout.by_rows_and_heads, new) if keep else None
            return layout.attend(query, new, packing, window), kept

        block = nnx.merge(structure, layout.opened("layers", own, compute_dtype))
        x, kept = block(x, rotation, attend)
        return layout.by_rows(x), kept

    # A loop is its own barrier against merging the recomputation with the forward pass.
    run_block = jax.checkpoint(run_block, policy=_REMAT_POLICIES[remat], prevent_cse=layout.unrolled)
    x = layout.by_rows(decoder.embed(token_ids, compute_dtype))
    each = params["layers"], jnp.asarray(config.windows, jnp.int32)
    x, kept = jax.lax.scan(run_block, x, each, unroll=layout.unrolled and not keep)
    return decoder.norm(x, x.dtype), kept


def hidden_states(
    config: DecoderConfig,
    params: Params,
    token_ids: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    prefix_ids: jax.Array,
    *,
    remat: Remat,
    compute_dtype: DTypeLike,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Final-normed hidden states of packed rows: int [B T] four times, as in TrainBatch -> compute_dtype [B T D].

    remat is what the backward pass recomputes: no matrix product, none but those of the masked reference, or whole
    blocks.
    """
    packing = Packing(positions, segment_ids, prefix_ids)
    return run_layers(
        config, params, token_ids, packing, layout=layout, keep=False, remat=remat, compute_dtype=compute_dtype
    )[0]
