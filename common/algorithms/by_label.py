"""Advantages where labels have rules of their own: each group by the type that its label asks for.

Statistics over the batch span the groups of one type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from common.algorithms.advantages import advantages, informative
from common.config.method import AdvantageConfig


def informative_groups(config: AdvantageConfig, labels: Sequence[str], *scores: np.ndarray) -> np.ndarray:
    """Which groups carry a gradient: [P] bool. labels: of each group; scores: as `informative` takes them."""
    found = np.zeros(len(labels), bool)
    for section, rows in _by_type(config, labels):
        found[rows] = informative(section, *(array[rows] for array in scores))
    return found


def group_advantages(config: AdvantageConfig, labels: Sequence[str], *scores: np.ndarray) -> np.ndarray:
    """Advantages [P G] float64. labels: of each group; scores: as `advantages` takes them."""
    found = np.zeros_like(scores[0])
    for section, rows in _by_type(config, labels):
        found[rows] = advantages(section, *(array[rows] for array in scores))
    return found


def _by_type(config: AdvantageConfig, labels: Sequence[str]) -> Iterator[tuple[AdvantageConfig, np.ndarray]]:
    types = np.array([config.labels.get(label, config.type) for label in labels])
    for name in dict.fromkeys(types.tolist()):
        yield config.model_copy(update={"type": name}), np.flatnonzero(types == name)
