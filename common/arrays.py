"""The one place that knows that engines exist: array namespaces, stop-gradient and segment sums.

A backend registers itself once, at start; numpy is always there. Code in `common/algorithms` asks by array, so that the
same line runs under numpy, torch (eager and compiled) and jax (eager and jitted).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Engine:
    """What the mathematics needs of an array library.

    namespace: a module with numpy's names for exp, where, clip, minimum, maximum and sum.
    stop_gradient: x -> x without gradient.
    segment_sum: (values [N], ids [N] int, num_segments) -> [num_segments].
    """

    array_type: type | tuple[type, ...]
    namespace: Any
    stop_gradient: Callable[[Array], Array]
    segment_sum: Callable[[Array, Array, int], Array]


def _numpy_segment_sum(values: np.ndarray, ids: np.ndarray, num_segments: int) -> np.ndarray:
    return np.bincount(ids, weights=values, minlength=num_segments).astype(values.dtype)


# numpy turns a sum into a scalar that is no ndarray.
_ENGINES = [Engine((np.ndarray, np.generic), np, lambda x: x, _numpy_segment_sum)]


def register(engine: Engine) -> None:
    """Make an engine known; called once by a backend's `main`."""
    if all(known.array_type is not engine.array_type for known in _ENGINES):
        _ENGINES.append(engine)


def _engine_of(x: Array) -> Engine:
    for engine in _ENGINES:
        if isinstance(x, engine.array_type):
            return engine
    raise TypeError(f"no engine is registered for arrays of type {type(x).__name__}")


def namespace(x: Array) -> Any:
    """The array namespace that x belongs to."""
    return _engine_of(x).namespace


def stop_gradient(x: Array) -> Array:
    """x, as a constant to differentiation."""
    return _engine_of(x).stop_gradient(x)


def sequence_sum(x: Array, segment_ids: Array) -> Array:
    """Sum of x [B T] over each sequence, given back to every token of it: [B T].

    A sequence is a run of one segment id within one row; it never spans two rows. Ids are smaller than T + 1.
    """
    rows, tokens = x.shape
    xp = namespace(x)
    row_index = xp.cumsum(xp.ones_like(segment_ids[:, :1]), 0) - 1
    ids = (row_index * (tokens + 1) + segment_ids).reshape(-1)
    sums = _engine_of(x).segment_sum(x.reshape(-1), ids, rows * (tokens + 1))
    return sums[ids].reshape(rows, tokens)
