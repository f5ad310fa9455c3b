"""A Hugging Face folder -> a decoder config and its stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common.data.model_weights import checked_model, open_tensors
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.names import is_stacked, tensor_names
from safework_jax.models.decoder.text import Params, init_params


def _on_default_device(path: str, array: np.ndarray) -> jax.Array:
    return jax.numpy.asarray(array)


def load_model(
    folder: Path, dtype: jax.typing.DTypeLike, place: Callable[[str, np.ndarray], jax.Array] = _on_default_device
) -> tuple[DecoderConfig, Params]:
    """Read a model folder, its weights cast to `dtype`.

    place: (path such as `layers.mlp.up.weight`, host array) -> the array where it shall live. One parameter, stacked
    over layers, is on the host at a time. Raises ConfigError for a config.json that the engines do not compute, and for
    tensors that do not fit it.
    """
    config = DecoderConfig.from_hf(checked_model(folder))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    leaves: dict[str, Any] = flatten_dict(shapes, sep=".")
    with ExitStack() as files:
        tensors = open_tensors(folder, files)
        params = {}
        for path, leaf in leaves.items():
            array = np.empty(leaf.shape, leaf.dtype)
            parts: Iterable[Any] = array if is_stacked(path) else [array]
            for part, name in zip(parts, tensor_names(path, config.num_layers), strict=True):
                part[...] = tensors[name].get_tensor(name)
            params[path] = place(path, array)
    return config, unflatten_dict(params, sep=".")
