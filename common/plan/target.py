"""Machines to plan for, by name: what one chip of each has, and how many there are."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from common.config import ConfigError

_EXAMPLES = "v5p:4x4x8, v5e:16x16, a100-80:64 or h100:8"


class Chip(NamedTuple):
    """One chip as its maker gives it. dimensions: of the torus that a pod of it is, 0 where chips are only counted.

    hertz: clock of its matrix units, 0 where no compiler's cycles are turned into seconds.
    """

    name: str
    engine: str
    dimensions: int
    memory_gib: float
    bf16_flops: float
    hertz: float


# Clocks follow from peak and matrix units: 4 of 128 x 128 in a v5e, 8 in a v5p.
CHIPS = (
    Chip("v5e", "jax", 2, 16, 197e12, 1.5e9),
    Chip("v5p", "jax", 3, 95, 459e12, 1.75e9),
    Chip("a100-80", "torch", 0, 80, 312e12, 0),
    Chip("h100", "torch", 0, 80, 989e12, 0),
    Chip("h200", "torch", 0, 140, 989e12, 0),
)


class Target(NamedTuple):
    """So many chips of one kind: `slices` pods of `shape` each."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def name(self) -> str:
        """As it is given: `v5p:4x4x8`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def read_target(text: str, slices: int) -> Target:
    """`v5p:4x4x8` as a Target. Raises ConfigError for a machine or a shape that is not known."""
    name, _, shape = text.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None:
        known = ", ".join(chip.name for chip in CHIPS)
        raise ConfigError(f"--target {text}: no machine is called {name!r}. Known: {known}. Write {_EXAMPLES}.")
    sizes = tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else ()
    if len(sizes) != max(chip.dimensions, 1):
        wanted = f"{chip.dimensions} sizes, as of its torus," if chip.dimensions else "the number of chips"
        raise ConfigError(f"--target {text}: {name} takes {wanted} after a colon. Write {_EXAMPLES}.")
    if slices < 1 or (slices > 1 and not chip.dimensions):
        raise ConfigError(f"--slices {slices}: a TPU target has 1 or more, another target 1. Correct it.")
    return Target(chip, sizes, slices)
