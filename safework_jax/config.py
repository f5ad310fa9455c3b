"""What only the JAX engine has: the `backend.jax` table. Imports no engine."""

from __future__ import annotations

from typing import Any

from common.config.section import PositiveInt, Section


class JaxSection(Section):
    """fsdp: devices that share weights and rows; 1 keeps everything on one device."""

    fsdp: PositiveInt = 1


def parse(table: dict[str, Any]) -> JaxSection:
    """The checked `backend.jax` table; raises pydantic.ValidationError."""
    return JaxSection.model_validate(table)
