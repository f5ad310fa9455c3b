"""What of a model is not trained: whole parameters, which have neither gradient nor moments, and single layers of
stacked ones, at which gradients and moments are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from common.data.frozen import frozen_names
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.names import tensor_names
from safework_jax.models.decoder.text import init_params
from safework_jax.sharding import parameter_path


class Frozen(NamedTuple):
    """The Hugging Face names of tensors that are not trained, of a model with so many layers. Hashable, a static
    argument of jit.
    """

    names: frozenset[str]
    num_layers: int

    @classmethod
    def matching(cls, patterns: Sequence[str], config: DecoderConfig) -> Frozen:
        """What the patterns of `model.frozen` match in a model."""
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.float32))
        paths = flatten_dict(shapes, sep=".")
        names = (name for path in paths for name in tensor_names(path, config.num_layers))
        return cls(frozen_names(names, patterns), config.num_layers)

    def trained(self, params: Any) -> Any:
        """The parameters of which at least a layer is trained."""
        flat = flatten_dict(params, sep=".")
        return unflatten_dict({path: leaf for path, leaf in flat.items() if not all(self._layers(path))}, sep=".")

    def completed(self, trained: Any, params: Any) -> Any:
        """All parameters, with what `trained` has in its place."""
        return unflatten_dict({**flatten_dict(params, sep="."), **flatten_dict(trained, sep=".")}, sep=".")

    def zeroed(self, tree: Any) -> Any:
        """A tree like `trained`, zero at the layers that are frozen."""

        def leaf(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
            frozen = self._layers(parameter_path(path))
            if not any(frozen):
                return array
            return jnp.where(jnp.array(frozen).reshape(-1, *[1] * (array.ndim - 1)), 0.0, array)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def _layers(self, path: str) -> list[bool]:
        return [name in self.names for name in tensor_names(path, self.num_layers)]
