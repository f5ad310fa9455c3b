"""A Hugging Face folder -> a decoder config and its stacked parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from common.config import ConfigError
from common.data.model_config import read_model_config
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.names import is_stacked, tensor_names
from safework_jax.models.decoder.text import Params, init_params

HEAD_AND_EMBEDDING = ("lm_head.weight", "model.embed_tokens.weight")


def _on_default_device(path: str, array: np.ndarray) -> jax.Array:
    return jax.numpy.asarray(array)


def load_model(
    folder: Path, dtype: jax.typing.DTypeLike, place: Callable[[str, np.ndarray], jax.Array] = _on_default_device
) -> tuple[DecoderConfig, Params]:
    """Read a model folder, its weights cast to `dtype`.

    place: (path such as `layers.mlp.up.weight`, host array) -> the array where it shall live. One parameter, stacked
    over layers, is on the host at a time.
    """
    config = DecoderConfig.from_hf(read_model_config(folder))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    leaves: dict[str, Any] = flatten_dict(shapes, sep=".")
    with ExitStack() as files:
        tensors = _open_tensors(folder, files)
        _check_tensors(folder, config, leaves, tensors)
        params = {}
        for path, leaf in leaves.items():
            array = np.empty(leaf.shape, leaf.dtype)
            parts: Iterable[Any] = array if is_stacked(path) else [array]
            for part, name in zip(parts, tensor_names(path, config.num_layers), strict=True):
                part[...] = tensors[name].get_tensor(name)
            params[path] = place(path, array)
    return config, unflatten_dict(params, sep=".")


def _open_tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Every tensor's name and the open file that holds it."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise ConfigError(f"model folder {folder} lacks {shard}; weights are read from safetensors files only.")
        file = files.enter_context(safetensors.safe_open(folder / shard, "np"))
        tensors.update(dict.fromkeys(file.keys(), file))
    return tensors


def _check_tensors(folder: Path, config: DecoderConfig, leaves: dict[str, Any], tensors: dict[str, Any]) -> None:
    expected = {
        name: list(leaf.shape[1:] if is_stacked(path) else leaf.shape)
        for path, leaf in leaves.items()
        for name in tensor_names(path, config.num_layers)
    }
    found = {name: list(file.get_slice(name).get_shape()) for name, file in tensors.items()}
    wrong = [
        f"{name} is {found[name]} where config.json asks for {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    # Older exports hold rotary frequencies, and some tied models a copy of the embedding.
    spare = {"lm_head.weight"} if config.tied_embeddings else set()
    unexpected = [name for name in found.keys() - expected.keys() - spare if not name.endswith(".rotary_emb.inv_freq")]
    problems = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", unexpected),
            ("of the wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise ConfigError(f"the tensors of {folder} do not fit its config.json: {'; '.join(problems)}.")
    if spare & found.keys() and not np.array_equal(*(tensors[name].get_tensor(name) for name in HEAD_AND_EMBEDDING)):
        raise ConfigError(
            f"model folder {folder}: config.json ties the head to the embedding, but lm_head.weight differs from it. "
            "Set tie_word_embeddings to false, or remove lm_head.weight."
        )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
