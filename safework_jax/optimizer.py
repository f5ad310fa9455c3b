"""The written AdamW rule in optax: eps outside the root, decoupled decay on matrices only, one global-norm clip;
and the average of the weights that follows it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.config.method import OptimizerConfig
from safework_jax.frozen import Frozen
from safework_jax.models.decoder.names import is_stacked
from safework_jax.sharding import HOST, mesh_of, parameter_path, place, placed_like_parameters, resting


def _is_matrix(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    # A stacked norm weight is [L D] and still a vector: its leading dimension counts layers.
    return leaf.ndim - is_stacked(parameter_path(path)) >= 2


def init_moments(params: Any, *, offload: bool) -> optax.ScaleByAdamState:
    """Zero moments, each placed like its parameter or, offloaded, in the memory of that device's host; and a step count
    of 0.
    """

    def zeros(leaf: jax.Array) -> jax.Array:
        return jax.device_put(jnp.zeros_like(leaf), resting(leaf.sharding, offload=offload))

    first, second = (jax.tree.map(zeros, params) for _ in range(2))
    return optax.ScaleByAdamState(step_count(params, 0), first, second)


def step_count(params: Any, steps: int) -> jax.Array:
    """A count of steps, int32 scalar, on every device that holds parameters."""
    mesh, sharding = mesh_of(params), jax.tree.leaves(params)[0].sharding
    return place(np.array(steps, np.int32), NamedSharding(mesh, PartitionSpec()) if mesh else sharding)


@jax.jit
def global_norm(gradients: Any) -> jax.Array:
    """Root of the sum of squares of all elements, fp32 scalar."""
    return optax.tree.norm(gradients)


def step(
    config: OptimizerConfig,
    params: Any,
    moments: optax.ScaleByAdamState,
    gradients: Any,
    norm: jax.Array,
    are_finite: jax.Array,
    rate: jax.Array | float,
    frozen: Frozen,
) -> tuple[Any, optax.ScaleByAdamState]:
    """Scale gradients of global norm `norm` down to `clip_norm` if they exceed it, then one AdamW step at `rate`; where
    they are not finite, nothing changes.

    params, moments, gradients: of what is trained. Parameters and moments stay where the parameters lie; `params` and
    `moments` are given up.
    """
    offloaded = _rest_on_host(moments)
    return _step(config, mesh_of(params), params, moments, gradients, norm, are_finite, rate, frozen, offloaded)


def lower_step(
    config: OptimizerConfig,
    params: Any,
    moments: optax.ScaleByAdamState,
    gradients: Any,
    number: jax.ShapeDtypeStruct,
    frozen: Frozen,
) -> jax.stages.Lowered:
    """`step` for shapes that say where they lie, not yet compiled; `number` is the shape of norm and rate."""
    offloaded, truth = _rest_on_host(moments), number.update(dtype=jnp.bool_)
    return _step.lower(config, mesh_of(params), params, moments, gradients, number, truth, number, frozen, offloaded)


def _rest_on_host(moments: optax.ScaleByAdamState) -> bool:
    return jax.tree.leaves(moments.mu)[0].sharding.memory_kind == HOST


@partial(jax.jit, static_argnames=("config", "mesh", "frozen", "offloaded"), donate_argnames=("params", "moments"))
def _step(
    config: OptimizerConfig,
    mesh: Mesh | None,
    params: Any,
    moments: optax.ScaleByAdamState,
    gradients: Any,
    norm: jax.Array,
    are_finite: jax.Array,
    rate: jax.Array | float,
    frozen: Frozen,
    offloaded: bool,
) -> tuple[Any, optax.ScaleByAdamState]:
    if offloaded:
        moments = jax.device_put(moments, jax.memory.Space.Device)
    scale = jnp.where(norm > config.clip_norm, config.clip_norm / norm, 1.0)
    gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, partial(jax.tree_util.tree_map_with_path, _is_matrix))
    direction, after = adam.update(gradients, moments)
    direction, _ = decay.update(direction, decay.init(params), params)
    assert isinstance(after, optax.ScaleByAdamState)
    direction = frozen.zeroed(direction)  # nor do frozen layers decay
    stepped = jax.tree.map(lambda parameter, change: parameter - rate * change, params, direction)
    params, after = jax.tree.map(partial(jnp.where, are_finite), (stepped, after), (params, moments))
    params, mu, nu = (placed_like_parameters(tree, mesh) for tree in (params, after.mu, after.nu))
    if offloaded:
        mu, nu = jax.device_put((mu, nu), jax.memory.Space.Host)
    return params, after._replace(mu=mu, nu=nu)


class Average:
    """The average of the weights by the rule of `EmaSection` (`common/config/run.py`): fp32, placed as they are."""

    def __init__(self, params: Any, decay: float, every: int) -> None:
        self._decay, self._every = decay, every
        self.weights = jax.tree.map(jnp.copy, params)

    def follow(self, params: Any, steps: int) -> None:
        """Take in the weights as they are after `steps` optimizer steps, if that is one of those that count."""
        if steps % self._every == 0:
            self.weights = _followed(mesh_of(params), self.weights, params, 1.0 - self._decay)


@partial(jax.jit, static_argnames=("mesh", "share"), donate_argnames="average")
def _followed(mesh: Mesh | None, average: Any, params: Any, share: float) -> Any:
    moved = jax.tree.map(lambda own, weight: own + share * (weight - own), average, params)
    return placed_like_parameters(moved, mesh)
