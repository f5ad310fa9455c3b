"""What only the JAX engine has: the `backend.jax` table. Imports no engine."""

from __future__ import annotations

from collections.abc import Iterator

from common.config.run import EngineSection, RunConfig
from common.config.section import PositiveInt


class JaxSection(EngineSection):
    """fsdp: devices that share weights and rows; 1 keeps everything on one device."""

    fsdp: PositiveInt = 1

    def problems(self, config: RunConfig) -> Iterator[tuple[str, str]]:
        """Rows that do not divide over the devices."""
        if config.batch.rows_per_microbatch % self.fsdp:
            yield (
                "batch.rows_per_microbatch",
                f"does not divide over backend.jax.fsdp = {self.fsdp} devices. Choose a multiple of {self.fsdp}.",
            )


SECTION = JaxSection
