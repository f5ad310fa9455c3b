"""What only the JAX engine has: the `backend.jax` table. Imports no engine."""

from __future__ import annotations

from common.config.section import PositiveInt, Section


class JaxSection(Section):
    """fsdp: devices that share weights and rows; 1 keeps everything on one device."""

    fsdp: PositiveInt = 1


SECTION = JaxSection
