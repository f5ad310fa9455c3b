"""What only the torch engine has: the `backend.torch` table. Imports no engine."""

from __future__ import annotations

from typing import Any

from common.config.section import Section


class TorchSection(Section):
    """compile: torch.compile on the decoder blocks (a GPU gains; the CPU's first step gets slower)."""

    compile: bool = False


def parse(table: dict[str, Any]) -> TorchSection:
    """The checked `backend.torch` table; raises pydantic.ValidationError."""
    return TorchSection.model_validate(table)
