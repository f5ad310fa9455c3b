"""What only the torch engine has: the `backend.torch` table. Imports no engine."""

from __future__ import annotations

from typing import Literal

from common.config.run import EngineSection

Sharding = Literal["zero1", "zero2", "zero3", "hybrid"]


class TorchSection(EngineSection):
    """compile: torch.compile on the decoder blocks (a GPU gains; the CPU's first step gets slower).

    sharding: what several processes share of weights, gradients and moments (`sharding.py` says what that costs).
    offload_parameters: the fp32 weights rest in host memory, and their gradients with them: 4 bytes a parameter less on
    the device between updates and 8 during one (zero1: 4). An update brings the weights to the device and back, each of
    its micro-batches the gradients to the host. A process alone in fp32 saves its gradients only: products need the
    weights.
    """

    compile: bool = False
    sharding: Sharding = "zero3"
    offload_parameters: bool = False


SECTION = TorchSection
