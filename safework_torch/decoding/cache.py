"""The static cache of keys and values that prefill fills and decoding reads, and the order of tokens in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from safework_torch.attention import by_layer_kind


class KeyValueCache:
    """Keys and values of every layer in `slots` fixed places: [R H S D] each, filled from the left up to `used`."""

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        self.used = 0
        self._slots = slots
        self._dtype = dtype
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with its new keys and values [R H T D]; returns all so far.

        What else a layer tells differs among versions of transformers, and is for caches of other kinds. The caller
        moves `used` on once all layers are done.
        """
        end = self.used + key.shape[2]
        if layer == len(self._layers):
            shape = (*key.shape[:2], self._slots, key.shape[3])
            self._layers.append((key.new_empty(shape, dtype=self._dtype), value.new_empty(shape, dtype=self._dtype)))
        keys, values = self._layers[layer]
        keys[:, :, self.used : end] = key
        values[:, :, self.used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order; a row may be taken several times."""
        for layer, (keys, values) in enumerate(self._layers):
            self._layers[layer] = (self._taken(keys, rows), self._taken(values, rows))

    def _taken(self, stored: Tensor, rows: Tensor) -> Tensor:
        taken = stored.new_empty((len(rows), *stored.shape[1:]))
        torch.index_select(stored[:, :, : self.used], 0, rows, out=taken[:, :, : self.used])
        return taken


@dataclass(frozen=True)
class Layout:
    """What stands in which slot of each row: the prefix that all prompts share, padding, the rest of the row's prompt,
    its response.

    shared: slots of the common prefix. padding: int [R], empty slots after it.
    """

    shared: int
    padding: Tensor

    def take(self, rows: Tensor) -> Layout:
        """The layout of the given rows, in the given order."""
        return Layout(self.shared, self.padding[rows])

    def positions(self, slots: Tensor) -> Tensor:
        """Each slot's position in its row's sequence: int [S] -> int [R S]; padding gets what its place would have."""
        return torch.where(slots < self.shared, slots, slots - self.padding[:, None])

    def masks(self, config: PreTrainedConfig, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
        """Who sees whom: int [Q], int [S] -> bool [R 1 Q S], or one for each kind of layer.

        Causal over what is real; padding sees itself, because a fully masked query would be NaN.
        """
        at = self.positions(keys)
        real = (keys < self.shared) | (at >= self.shared)
        full = real[:, None, :] & (queries[:, None] >= keys) | (queries[:, None] == keys)
        distance = self.positions(queries)[:, :, None] - at[:, None, :]

        def visible(window: int | None) -> Tensor:
            return (full if window is None else full & (distance < window))[:, None]

        return by_layer_kind(config, visible)
