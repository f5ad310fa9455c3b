"""Central finite differences on plain numpy that honour `stop_gradient`.

A Probe is an array at two points at once: where the input was moved, and where it was not. Every operation is done at
both; `stop_gradient` puts the unmoved value in both places. No derivative rule is written here, so what is measured is
the slope of the code itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from common.arrays import Engine, register

STEP = 1e-5


class Probe(NDArrayOperatorsMixin):
    """float64 values `moved` and `base`, of one shape."""

    def __init__(self, moved: Any, base: Any) -> None:
        self.moved, self.base = np.asarray(moved), np.asarray(base)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Probe:
        assert method == "__call__"
        return _at_both(ufunc, inputs, options)

    def __array_function__(self, function: Callable[..., Any], types: Any, inputs: Any, options: Any) -> Probe:
        return _at_both(function, inputs, options)

    def __getitem__(self, index: Any) -> Probe:
        return Probe(self.moved[index], self.base[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def reshape(self, *shape: int) -> Probe:
        return Probe(self.moved.reshape(*shape), self.base.reshape(*shape))

    def sum(self) -> Probe:
        return Probe(self.moved.sum(), self.base.sum())

    def max(self) -> Probe:
        return Probe(self.moved.max(), self.base.max())


def _at_both(function: Callable[..., Any], inputs: Any, options: dict[str, Any]) -> Probe:
    def at(place: str) -> Any:
        return function(*(getattr(x, place) if isinstance(x, Probe) else x for x in inputs), **options)

    return Probe(at("moved"), at("base"))


def _segment_sum(values: Probe, ids: np.ndarray, num_segments: int) -> Probe:
    sums = Probe(np.zeros(num_segments), np.zeros(num_segments))
    for index, segment in enumerate(ids):
        sums.moved[segment] += values.moved[index]
        sums.base[segment] += values.base[index]
    return sums


register(Engine(Probe, np, lambda x: Probe(x.base, x.base), _segment_sum))


def gradient(function: Callable[[Any], Any], x: np.ndarray, step: float = STEP) -> np.ndarray:
    """Slope of a scalar function along each entry of x, for x of any shape.

    `function` takes what `common/algorithms` takes as logprobs and gives back its sum.
    """
    slopes = np.zeros_like(x, dtype=np.float64)
    for index in np.ndindex(x.shape):
        up, down = x.astype(np.float64), x.astype(np.float64)
        up[index] += step
        down[index] -= step
        rise = function(Probe(up, x)).moved - function(Probe(down, x)).moved
        slopes[index] = rise / (2 * step)
    return slopes
