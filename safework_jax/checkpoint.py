"""Training state between JAX, which stacks layers, and the files of `common/state_files.py`, which do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from common.state_files import open_state, whole
from common.types import Kind, Piece, TrainingState
from safework_jax.frozen import Frozen
from safework_jax.model import read_parameter
from safework_jax.models.decoder.names import is_stacked, tensor_names
from safework_jax.optimizer import Average, step_count
from safework_jax.sharding import host, parameter_path, place


def named(tree: Any, frozen: Frozen) -> dict[str, np.ndarray]:
    """A tree like the trained parameters as host arrays under the Hugging Face names of what is trained, without copies
    where the device is the host.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text, found = parameter_path(path), host(leaf)
        parts = found if is_stacked(text) else [found]
        arrays |= dict(zip(tensor_names(text, frozen.num_layers), parts, strict=True))
    return {name: array for name, array in arrays.items() if name not in frozen.names}


def stacked(arrays: Mapping[str, np.ndarray], like: Any, frozen: Frozen) -> Any:
    """The inverse of `named`: a tree shaped and placed like `like`, zero at frozen layers."""

    def leaf(path: tuple[Any, ...], target: jax.Array) -> jax.Array:
        text = parameter_path(path)
        if not is_stacked(text):
            [name] = tensor_names(text, frozen.num_layers)
            return place(arrays[name], target.sharding)
        whole = np.zeros(target.shape, target.dtype)
        for layer, name in zip(whole, tensor_names(text, frozen.num_layers), strict=True):
            if name not in frozen.names:
                layer[...] = arrays[name]
        return place(whole, target.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def snapshot(params: Any, moments: optax.ScaleByAdamState, average: Average | None, frozen: Frozen) -> TrainingState:
    """A copy of this process's shards of parameters, moments of what is trained, and average; none of a shard that a
    process before it has too.
    """

    def moment(tree: Any) -> dict[str, list[Piece]]:
        pieces = _pieces(tree, frozen.num_layers)
        return {name: own for name, own in pieces.items() if name not in frozen.names}

    kinds: dict[Kind, dict[str, list[Piece]]] = {
        "model": _pieces(params, frozen.num_layers),
        "first_moment": moment(moments.mu),
        "second_moment": moment(moments.nu),
    }
    if average is not None:
        kinds["ema"] = _pieces(average.weights, frozen.num_layers)
    return TrainingState(kinds, int(np.asarray(moments.count)))


def _pieces(tree: Any, num_layers: int) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text = parameter_path(path)
        own = list(_own_pieces(leaf))
        if not is_stacked(text):
            pieces[tensor_names(text, num_layers)[0]] = own
            continue
        for layer, name in enumerate(tensor_names(text, num_layers)):
            pieces[name] = [Piece(array[layer], start[1:], shape[1:]) for array, start, shape in own]
    return pieces


def _own_pieces(leaf: jax.Array) -> Iterator[Piece]:
    """Copies of what this process has of an array and is the first to have: the next update overwrites the array."""
    if leaf.is_fully_addressable:
        yield from whole(np.array(leaf))
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(part.start or 0 for part in shard.index)
            yield Piece(np.array(shard.data), start, leaf.shape)


def restore_state(
    params: Any, moments: optax.ScaleByAdamState, average: Average | None, frozen: Frozen, folder: Path
) -> tuple[Any, optax.ScaleByAdamState]:
    """Parameters and moments out of a saved state, placed like those given, and the average in its place; only what
    this process holds is read. Raises NotSaved where it cannot be.
    """
    with open_state(folder) as saved:
        saved.refuse_other_shapes(_shapes(params, frozen.num_layers))

        def read(like: Any, kind: Kind) -> Any:
            from_kind = partial(read_part, kind)
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: read_parameter(parameter_path(path), leaf, frozen.num_layers, from_kind), like
            )

        def read_part(kind: Kind, name: str, part: tuple[slice, ...]) -> np.ndarray:
            moment_of_nothing = kind.endswith("moment") and name in frozen.names
            return np.zeros((), np.float32) if moment_of_nothing else saved.read(kind, name, part)

        if average is not None:
            average.weights = read(params, "ema" if "ema" in saved.kinds else "model")
        count = step_count(params, saved.optimizer_steps)
        first, second = read(moments.mu, "first_moment"), read(moments.nu, "second_moment")
        return read(params, "model"), optax.ScaleByAdamState(count, first, second)


def _shapes(params: Any, num_layers: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        text = parameter_path(path)
        shape = leaf.shape[1:] if is_stacked(text) else leaf.shape
        shapes |= dict.fromkeys(tensor_names(text, num_layers), shape)
    return shapes
