"""A Hugging Face folder -> a decoder config and its stacked parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding, SingleDeviceSharding

from common.data.model_weights import checked_model, open_tensors
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.names import is_stacked, tensor_names
from safework_jax.models.decoder.text import Params, init_params


def _on_first_device(_path: str, _shape: tuple[int, ...]) -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def load_model(
    folder: Path,
    dtype: jax.typing.DTypeLike,
    sharding: Callable[[str, tuple[int, ...]], Sharding] = _on_first_device,
) -> tuple[DecoderConfig, Params]:
    """Read a model folder, its weights cast to `dtype`; each process reads what shall lie on its devices.

    sharding: (path such as `layers.mlp.up.weight`, shape, stacked over layers) -> where the parameter shall lie. Raises
    ConfigError for a config.json that the engines do not compute, and for tensors that do not fit it.
    """
    config = DecoderConfig.from_hf(checked_model(folder))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    leaves: dict[str, Any] = flatten_dict(shapes, sep=".")
    with ExitStack() as files:
        tensors = open_tensors(folder, files)

        def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
            return tensors[name].get_slice(name)[part]

        params = {
            path: read_parameter(path, leaf.update(sharding=sharding(path, leaf.shape)), config.num_layers, read)
            for path, leaf in leaves.items()
        }
    return config, unflatten_dict(params, sep=".")


def read_parameter(
    path: str, like: jax.ShapeDtypeStruct | jax.Array, num_layers: int, read: Callable[[str, tuple[slice, ...]], Any]
) -> jax.Array:
    """A parameter of the shape, dtype and sharding of `like`; read: (Hugging Face name, part) -> that part of a tensor.
    The host has the part of one device at a time.
    """
    names = tensor_names(path, num_layers)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if not is_stacked(path):
            return read(names[0], index).astype(like.dtype, copy=False)
        sizes = (len(range(*cut.indices(size))) for cut, size in zip(index, like.shape, strict=True))
        found = np.empty(tuple(sizes), like.dtype)
        for layer, name in zip(found, names[index[0]], strict=True):
            layer[...] = read(name, index[1:])
        return found

    # Host memory is free for the next one only when this one has arrived.
    return jax.block_until_ready(jax.make_array_from_callback(like.shape, like.sharding, part))
