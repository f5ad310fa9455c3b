"""What only the JAX engine has: the `backend.jax` table. Imports no engine."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import Field

from common.config.run import EngineSection, RunConfig
from common.config.section import PositiveInt, Section


class MeshSection(Section):
    """The devices of a run as one mesh, outermost axis first; as many as the product of the four.

    replica: groups of devices that each hold all weights; only gradients pass between them. fsdp: devices that share
    weights and rows. context: 1; no code splits a row yet. tensor: devices that share each weight and each row's heads.
    """

    replica: PositiveInt = 1
    fsdp: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Devices along each axis, in the order of the fields."""
        return self.replica, self.fsdp, self.context, self.tensor

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return math.prod(self.shape)

    @property
    def row_shares(self) -> int:
        """Groups of devices that the rows of a micro-batch are divided over."""
        return self.replica * self.fsdp


class JaxSection(EngineSection):
    """mesh: the devices and what each axis of them shares; all 1 keeps everything on one device."""

    mesh: MeshSection = Field(default_factory=MeshSection)

    def problems(self, config: RunConfig) -> Iterator[tuple[str, str]]:
        """Rows that do not divide over the devices, and an axis that is not served."""
        mesh = self.mesh
        if config.batch.rows_per_microbatch % mesh.row_shares:
            yield (
                "batch.rows_per_microbatch",
                f"does not divide over backend.jax.mesh.replica x fsdp = {mesh.replica} x {mesh.fsdp} devices. "
                f"Choose a multiple of {mesh.row_shares}.",
            )
        if mesh.context != 1:
            yield (
                "backend.jax.mesh.context",
                "splits rows over devices, which this engine does not do yet. Set it to 1, and raise mesh.fsdp or "
                "mesh.tensor instead.",
            )


SECTION = JaxSection
