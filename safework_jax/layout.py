"""Where the arrays of one pass lie on a mesh, so that the model needs not know: rows, opened weights, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from common.config import ConfigError
from safework_jax.attention import (
    KeyValues,
    Packing,
    cudnn_attention,
    masked_attention,
    splash_attention,
    visible_tokens,
)
from safework_jax.models.decoder.config import NO_WINDOW, DecoderConfig
from safework_jax.sharding import ROWS, parameter_path, placement

Kernel = Literal["masked", "splash", "cudnn"]
# A CPU stays near its caches. A GPU wants large products and adds up the weight's gradient, in fp32, once a chunk; a
# TPU has less memory: 512 x 150k vocabulary x 4 bytes = 0.3 GB.
_LOGITS = {"cpu": 512, "tpu": 512, "gpu": 8192}


class Layout(NamedTuple):
    """One mesh, None for a single device, and what its platform has and likes; hashable, for jit.

    kernel: the attention. logits: positions of one device's rows whose logits exist at one time. most_segments:
    segments of a row at most, padding counted, and 1 for a sequence and padding; only cuDNN asks.
    """

    mesh: Mesh | None
    kernel: Kernel
    logits: int = 512
    most_segments: int = 0

    @property
    def unrolled(self) -> bool:
        """Whether layers come one after the other, in place of a loop: that copies all it keeps for the backward pass,
        a tenth of a GPU's time where its kernel attends; the compiler takes some seconds more.
        """
        return self.kernel == "cudnn"

    def for_rows(self, segment_ids: np.ndarray) -> Layout:
        """The layout for rows with these segments, int [B T]: few sizes, so that few programs are compiled."""
        if self.kernel != "cudnn":
            return self
        if segment_ids.max() <= 1:
            return self._replace(most_segments=1)
        most = 1 + int((np.diff(segment_ids, axis=1) != 0).sum(axis=1).max())
        return self._replace(most_segments=max(8, 1 << (most - 1).bit_length()))

    def by_rows(self, x: jax.Array) -> jax.Array:
        """x [B ...], its rows split over replica and fsdp where they divide, and whole along every other axis."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._rows(len(x))))

    def by_rows_and_heads(self, x: jax.Array) -> jax.Array:
        """x [B K ...] by rows, and its heads split over tensor where they divide."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.rows_and_heads(x.shape)))

    def rows_and_heads(self, shape: tuple[int, ...]) -> PartitionSpec:
        """The axes of an array [B K ...] by rows and heads, on a mesh."""
        assert self.mesh is not None
        heads = "tensor" if shape[1] % self.mesh.shape["tensor"] == 0 else None
        return PartitionSpec(*self._rows(shape[0]), heads)

    def opened(self, name: str, tree: Any, dtype: DTypeLike) -> Any:
        """Parameters of the module `name` (`layers`: one layer's), whole along fsdp, for a pass that computes in dtype.

        They are rounded to dtype before they travel and handed on in their own dtype, in which their gradients come
        back, are summed over the devices and go to where the parameters lie.
        """
        mesh = self.mesh
        if mesh is None:
            return tree

        def opened(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
            spec = placement(f"{name}.{parameter_path(path)}")
            spec = PartitionSpec(*spec[1:]) if name == "layers" else spec
            whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
            return _opened(weight, dtype, NamedSharding(mesh, whole), NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(opened, tree)

    def attend(self, query: jax.Array, new: KeyValues, packing: Packing, window: jax.Array) -> jax.Array:
        """Attention within packed rows: query [B T H head_dim], keys [B K T head_dim] -> shape of query."""
        match self.kernel:
            case "masked":
                return masked_attention(query, new, visible_tokens(packing, window))
            case "splash":
                kernel = splash_attention
            case "cudnn":
                kernel = partial(cudnn_attention, most_segments=self.most_segments)
        return self._on_shards(kernel)(query, new, packing.segment_ids)

    def _on_shards(self, kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """A kernel, which XLA cannot split by itself, run by each device on its rows and heads."""
        if self.mesh is None:
            return kernel

        def run(query: jax.Array, new: KeyValues, segment_ids: jax.Array) -> jax.Array:
            [rows] = self._rows(len(query))
            heads, key_heads = PartitionSpec(rows, None, "tensor"), PartitionSpec(rows, "tensor")
            return jax.shard_map(
                kernel,
                mesh=self.mesh,
                in_specs=(heads, key_heads, PartitionSpec(rows)),
                out_specs=heads,
                check_vma=False,  # kernels do not say along which axes their results vary: all that their inputs do
            )(query, new, segment_ids)

        return run

    def _rows(self, count: int) -> PartitionSpec:
        assert self.mesh is not None
        return ROWS if count % (self.mesh.shape["replica"] * self.mesh.shape["fsdp"]) == 0 else PartitionSpec(None)


ONE_DEVICE = Layout(None, "masked")


def layout_on(mesh: Mesh, model: DecoderConfig, dtype: DTypeLike, share_prompts: bool) -> Layout:
    """The layout of a model's passes on a mesh, with the fastest attention that serves them there.

    Splash attention on TPU, and cuDNN's on GPUs from Hopper on in bfloat16, serve rows of whole segments. Shared
    prompts, sliding windows and everything else have the masked reference, which holds the scores of whole rows.
    Raises ConfigError when a kernel cannot split the model's heads over the mesh.
    """
    device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
    kernel: Kernel = "masked"
    if not share_prompts and set(model.windows) == {NO_WINDOW}:
        if device.platform == "tpu":
            kernel = "splash"
        elif device.platform == "gpu" and dtype == jnp.bfloat16 and float(device.compute_capability) >= 9:
            kernel = "cudnn"
    if kernel != "masked" and model.num_kv_heads % tensor:
        raise ConfigError(
            f"backend.jax.mesh.tensor = {tensor}: does not divide the model's {model.num_kv_heads} key heads. "
            "Choose a number that does."
        )
    return Layout(None if mesh.size == 1 else mesh, kernel, _LOGITS[device.platform])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _opened(weight: jax.Array, dtype: DTypeLike, whole: NamedSharding, lying: NamedSharding) -> jax.Array:
    rounded = jax.lax.with_sharding_constraint(weight.astype(dtype), whole)
    return rounded.astype(weight.dtype)


def _opened_forward(
    weight: jax.Array, dtype: DTypeLike, whole: NamedSharding, lying: NamedSharding
) -> tuple[jax.Array, None]:
    return _opened(weight, dtype, whole, lying), None


def _opened_backward(
    dtype: DTypeLike, whole: NamedSharding, lying: NamedSharding, kept: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, lying),)


_opened.defvjp(_opened_forward, _opened_backward)
