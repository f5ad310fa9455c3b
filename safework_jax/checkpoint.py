"""Training state between JAX, which stacks layers, and the files of `common/state_files.py`, which do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from common.state_files import TrainingState, read_state, write_state
from safework_jax.models.decoder.names import is_stacked, tensor_names
from safework_jax.optimizer import step_count
from safework_jax.sharding import host, parameter_path, place


def named(tree: Any, num_layers: int) -> dict[str, np.ndarray]:
    """A parameter-shaped tree as host arrays under Hugging Face names, without copies where the device is the host."""
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text, whole = parameter_path(path), host(leaf)
        parts = whole if is_stacked(text) else [whole]
        arrays |= dict(zip(tensor_names(text, num_layers), parts, strict=True))
    return arrays


def stacked(arrays: Mapping[str, np.ndarray], like: Any, num_layers: int) -> Any:
    """The inverse of `named`: a tree shaped and placed like `like`."""

    def leaf(path: tuple[Any, ...], target: jax.Array) -> jax.Array:
        text = parameter_path(path)
        parts = [arrays[name] for name in tensor_names(text, num_layers)]
        return place(np.stack(parts) if is_stacked(text) else parts[0], target.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def save_state(params: Any, moments: optax.ScaleByAdamState, num_layers: int, folder: Path) -> None:
    """Write parameters and AdamW moments into a folder: every process gives its shards, the first one writes. Raises
    OSError when the disk does.
    """
    weights, first, second = (named(tree, num_layers) for tree in (params, moments.mu, moments.nu))
    if jax.process_index() == 0:
        write_state(TrainingState(weights, first, second, int(np.asarray(moments.count))), folder)


def restore_state(params: Any, num_layers: int, folder: Path) -> tuple[Any, optax.ScaleByAdamState]:
    """Parameters and moments as `save_state` wrote them, placed like `params`."""
    state = read_state(folder)
    first, second = (stacked(arrays, params, num_layers) for arrays in (state.first_moment, state.second_moment))
    count = step_count(params, state.optimizer_steps)
    return stacked(state.parameters, params, num_layers), optax.ScaleByAdamState(count, first, second)
