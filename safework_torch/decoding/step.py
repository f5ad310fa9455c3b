"""One decoding step: a token for each row through all layers of a Hugging Face model.

The modules' own forward passes spend more time between their matrix products than in them when there are a few rows:
here query, key and value are one product, gate and up are another, and weights are cast once, not at every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from safework_torch.decoding.cache import KeyValueCache
from safework_torch.model import wide_product


class _Projection:
    """One matrix product for linear layers that read the same vector; their outputs stand side by side.

    A CPU gets the weight in oneDNN's own order, by the operators that torch's compiler emits: with a few rows the
    product is a third faster than on the plain matrix.
    """

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype) -> None:
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        weight = weight.detach().to(dtype)
        self.bias = torch.cat(biases).detach().to(dtype) if biases else None
        self.dtype = dtype
        self.packed = weight.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[R in] of any dtype -> [R out] in the projection's."""
        x = x.to(self.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """The same in fp32, of a projection without bias, not rounded in between where the device can do without."""
        return self(x) if self.packed else wide_product(x.to(self.dtype), self.weight.T)


class _Layer:
    """A decoder layer of the families in `safework_torch/model.py`, its weights in the dtype of the products."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.query_key_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self.query_key_value = _Projection(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.output = _Projection(attention.o_proj, dtype=dtype)
        self.gate_up = _Projection(mlp.gate_proj, mlp.up_proj, dtype=dtype)
        self.down = _Projection(mlp.down_proj, dtype=dtype)
        self.activation = mlp.act_fn
        self.head_dim = attention.head_dim
        self.num_key_heads = attention.k_proj.out_features // self.head_dim

    def normed_query_key(self, heads: Tensor) -> Tensor:
        """Query heads, then key heads, [R H head_dim], each normed where the family does so."""
        if self.query_key_norms is None:
            return heads
        query_norm, key_norm = self.query_key_norms
        query, key = heads[:, : -self.num_key_heads], heads[:, -self.num_key_heads :]
        return torch.cat((query_norm(query), key_norm(key)), dim=1)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _score_term(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # Added to the scores. The attention kernel would make it from the bool mask too, but in every layer again.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


class DecodeStep:
    """The model's weights ready for decoding; they are as they were when this was made."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._model: Any = model.model
        self._layers = [_Layer(layer, dtype) for layer in self._model.layers]
        self._head = _Projection(model.lm_head, dtype=dtype)

    def __call__(
        self, tokens: Tensor, positions: Tensor, visible: Tensor | dict[str, Tensor], cache: KeyValueCache
    ) -> Tensor:
        """tokens, positions: int [R]. visible: bool [R 1 1 S], or one for each kind of layer -> logits fp32 [R V].

        The new keys and values go into the cache's next slot.
        """
        x = self._model.embed_tokens(tokens)
        cos, sin = self._model.rotary_emb(x, positions[:, None])
        terms = tree_map(partial(_score_term, dtype=self.dtype), visible)
        for index, layer in enumerate(self._layers):
            term = terms if isinstance(terms, Tensor) else terms[self._model.config.layer_types[index]]
            x = x + _attended(layer, _normed(layer.attention_norm, x), cos, sin, term, cache, index)
            gate, up = layer.gate_up(_normed(layer.mlp_norm, x)).chunk(2, dim=-1)
            x = x + layer.down(layer.activation(gate) * up)
        cache.used += 1
        return self._head.wide(_normed(self._model.norm, x))


def _attended(
    layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, term: Tensor, cache: KeyValueCache, index: int
) -> Tensor:
    """Attention of one new token a row to all that the cache holds and itself: [R D] -> [R D]."""
    heads = layer.query_key_value(x).unflatten(-1, (-1, layer.head_dim))
    value = heads[:, -layer.num_key_heads :]
    turned = _rotated(layer.normed_query_key(heads[:, : -layer.num_key_heads]), cos, sin)
    query, key = turned[:, : -layer.num_key_heads], turned[:, -layer.num_key_heads :]
    keys, values = cache.update(key[:, :, None], value[:, :, None], index)
    # Heads that share a key head stand where the kernel expects several queries: they see the same keys.
    grouped = query.to(keys.dtype).unflatten(1, (layer.num_key_heads, -1))
    mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=term)
    return layer.output(mixed.flatten(1))
