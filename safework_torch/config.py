"""What only the torch engine has: the `backend.torch` table. Imports no engine."""

from __future__ import annotations

from common.config.run import EngineSection


class TorchSection(EngineSection):
    """compile: torch.compile on the decoder blocks (a GPU gains; the CPU's first step gets slower)."""

    compile: bool = False


SECTION = TorchSection
