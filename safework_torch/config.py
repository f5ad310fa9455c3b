"""What only the torch engine has: the `backend.torch` table. Imports no engine."""

from __future__ import annotations

from typing import Literal

from common.config.run import EngineSection

Sharding = Literal["zero1", "zero2", "zero3", "hybrid"]


class TorchSection(EngineSection):
    """compile: torch.compile on the decoder blocks (a GPU gains; the CPU's first step gets slower).

    sharding: what several processes share of weights, gradients and moments (`sharding.py` says what that costs).
    """

    compile: bool = False
    sharding: Sharding = "zero3"


SECTION = TorchSection
