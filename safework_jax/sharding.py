"""One mesh and one small table: where each parameter and each batch array lives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from common.config import ConfigError
from safework_jax.config import MeshSection

AXES = ("replica", "fsdp", "context", "tensor")
ROWS = PartitionSpec(("replica", "fsdp"))
HOST = "pinned_host"  # JAX's name for memory of the host from which devices copy

# First match wins. Stacked blocks have a leading layer dimension, which is never split.
PLACEMENT = (
    (r"(embed|head)\.weight", PartitionSpec("tensor", "fsdp")),
    (r"layers\..*\.(query|key|value|gate|up)\.weight", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers\..*\.(output|down)\.weight", PartitionSpec(None, "fsdp", "tensor")),
    (r".*", PartitionSpec()),
)


def make_mesh(shape: MeshSection) -> Mesh:
    """The mesh over all devices of the run. Raises ConfigError when there are fewer or, in a team, more."""
    devices = jax.devices()
    asked = f"backend.jax.mesh = {shape.num_devices} devices"
    if len(devices) < shape.num_devices:
        raise ConfigError(
            f"{asked}: only {len(devices)} devices are visible ({devices[0].platform}). "
            "Lower an axis, or run on more devices."
        )
    if jax.process_count() > 1 and len(devices) != shape.num_devices:
        raise ConfigError(
            f"{asked}: the processes of this run have {len(devices)} devices, and must use them all. "
            f"Choose axes whose product is {len(devices)}."
        )
    return mesh_over(devices[: shape.num_devices], shape)


def own_mesh() -> Mesh:
    """The first device of this process alone."""
    return mesh_over(jax.local_devices()[:1], MeshSection())


def mesh_over(devices: Sequence[Any], shape: MeshSection) -> Mesh:
    """A mesh of this shape over as many devices, laid along the chips' network where the platform knows it.

    Several slices lie along the replica axis, so that only gradients pass between them. Raises ConfigError when they
    do not divide it.
    """
    # Only TPUs lie in slices, and a described topology of one slice does not number it.
    numbered = devices[0].platform == "tpu" and hasattr(devices[0], "slice_index")
    slices = len({device.slice_index for device in devices}) if numbered else 1
    if shape.replica % slices:
        raise ConfigError(
            f"backend.jax.mesh.replica = {shape.replica}: does not divide over {slices} slices, which share no weights."
            f" Choose a multiple of {slices}."
        )
    within = (shape.replica // slices, *shape.shape[1:])
    # An axis of the mesh may take a part of an axis of the chips' torus: 2 of 4x4x4 chips, say.
    if slices == 1:
        laid_out = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        laid_out = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_path(path: tuple[Any, ...]) -> str:
    """A pytree path as `layers.mlp.up.weight`."""
    return ".".join(str(entry.key) for entry in path)


def placement(path: str) -> PartitionSpec:
    """The axes that a parameter's dimensions are split over."""
    return next(spec for pattern, spec in PLACEMENT if re.fullmatch(pattern, path))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None where they lie on a device without one."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return None
    assert isinstance(sharding.mesh, Mesh), "parameters lie on devices"
    return sharding.mesh


def placed_like_parameters(tree: Any, mesh: Mesh | None) -> Any:
    """A parameter-shaped tree, inside jit, held to where the table places the parameters on a mesh.

    Left to itself, XLA spreads small replicated arrays over the devices, and every program compiles once more.
    """
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, placement(parameter_path(path)))),
        tree,
    )


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh, *, offload: bool = False) -> Sharding:
    """Where the table puts a parameter; offloaded, in host memory.

    Raises ConfigError when a dimension does not divide over the devices it is placed on.
    """
    spec = placement(path)
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"backend.jax.mesh.{axis} = {mesh.shape[axis]}: does not divide {path} of shape {shape}. "
                f"Choose a number of devices that divides {size}."
            )
    return resting(NamedSharding(mesh, spec), offload=offload)


def resting(sharding: Sharding, *, offload: bool) -> Sharding:
    """Where arrays lie, or rest, offloaded, in the memory of those devices' hosts."""
    return sharding.with_memory_kind(HOST) if offload else sharding


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Batch arrays [B ...] are split by rows."""
    return NamedSharding(mesh, ROWS)


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process has whole, laid out over the devices of all."""
    with jax.transfer_guard("allow"):  # JAX counts this as done in passing; it is what is asked for
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def host(array: jax.Array) -> np.ndarray:
    """All of an array, on every process; without a copy where the device is the host. All must ask at the same time."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
