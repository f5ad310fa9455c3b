"""The learning rate of each update: linear warm-up, then cosine down to a floor."""

from __future__ import annotations

import math
from fractions import Fraction

from common.config.method import OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """Learning rate of update number `update` (from 0) out of `total_updates`.

    Warm-up reaches the peak on its last update; the cosine reaches `floor_fraction` of the peak on the last update of
    the run. With more `total_updates` than before (a raised `run.steps`) the curve is the longer run's from there on.
    """
    # As it was written: 0.07 of 100 updates is 7, though 0.07 * 100 is a little more.
    warmup = math.ceil(Fraction(str(config.warmup_fraction)) * total_updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    progress = min(1.0, (update - warmup + 1) / max(1, total_updates - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.floor_fraction + (1.0 - config.floor_fraction) * cosine)
