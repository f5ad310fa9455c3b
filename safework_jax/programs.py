"""What the trainer runs on its devices: logprobs of packed rows, and the gradient of a micro-batch.

`safework_jax/plan.py` compiles these same functions for devices that are not there.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.algorithms.objective import Sums, TokenArrays, objective
from common.config import LossConfig, RunConfig
from safework_jax.frozen import Frozen
from safework_jax.layout import Layout, layout_on
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.text import Params, Remat, head_weight, hidden_states
from safework_jax.sampling import Decoding
from safework_jax.sharding import placed_like_parameters
from safework_jax.token_logprobs import token_logprobs

Arrays = dict[str, jax.Array]


class Program(NamedTuple):
    """What a compiled pass depends on besides its arrays; hashable, a static argument of jit."""

    model: DecoderConfig
    loss: LossConfig
    temperature: float
    recompute: Remat
    dtype: jnp.dtype
    layout: Layout
    frozen: Frozen

    def for_rows(self, segment_ids: np.ndarray) -> Program:
        """The program for rows with these segments, int [B T]."""
        return self._replace(layout=self.layout.for_rows(segment_ids))

    @property
    def decoding(self) -> Decoding:
        """What the embedded sampler needs of it."""
        return Decoding(self.model, self.dtype, self.layout)


def program_for(config: RunConfig, model: DecoderConfig, mesh: Mesh) -> Program:
    """The program of a config for a model on a mesh. Raises ConfigError for a mesh that its attention cannot use."""
    dtype = jnp.dtype(config.backend.dtype)
    layout = layout_on(mesh, model, dtype, config.batch.share_prompts)
    frozen = Frozen.matching(config.model.frozen, model)
    return Program(model, config.loss, config.rollout.temperature, config.backend.recompute, dtype, layout, frozen)


@partial(jax.jit, static_argnames="program")
def logprobs(params: Params, rows: Arrays, program: Program) -> tuple[jax.Array, jax.Array]:
    """Logprobs and entropies, fp32 [B T], of a micro-batch: the arrays of a TrainBatch, by name."""
    hidden = hidden_states(
        program.model,
        params,
        rows["token_ids"],
        rows["positions"],
        rows["segment_ids"],
        rows["prefix_ids"],
        remat=program.recompute,
        compute_dtype=program.dtype,
        layout=program.layout,
    )
    weight = head_weight(program.model, params)
    wanted = rows["token_ids"], rows["previous"], rows["sampled"]
    return token_logprobs(hidden, weight, *wanted, program.temperature, program.layout)


@partial(jax.jit, static_argnames="mesh")
def arrived(params: Params, mesh: Mesh) -> Params:
    """Parameters that rest in host memory, on the devices."""
    return placed_like_parameters(jax.device_put(params, jax.memory.Space.Device), mesh)


@partial(jax.jit, static_argnames="mesh")
def no_gradients(params: Params, mesh: Mesh) -> Params:
    """Zeros shaped and placed like the parameters."""
    return placed_like_parameters(jax.tree.map(jnp.zeros_like, params), mesh)


@partial(jax.jit, static_argnames="program", donate_argnames="gradients")
def accumulate(params: Params, gradients: Params, rows: Arrays, program: Program) -> tuple[Params, jax.Array, Sums]:
    """Add a micro-batch's gradient, of what is trained, to `gradients`, which is given up; its loss and statistics,
    scalars.
    """

    def loss_of(trained: Params) -> tuple[jax.Array, Sums]:
        found, entropy = logprobs(program.frozen.completed(trained, params), rows, program)
        constants = TokenArrays(*(rows.get(name) for name in TokenArrays._fields))
        return objective(program.loss, found, entropy, constants)

    (loss, sums), new = jax.value_and_grad(loss_of, has_aux=True)(program.frozen.trained(params))
    total = jax.tree.map(jnp.add, gradients, program.frozen.zeroed(new))
    if program.layout.mesh is not None:
        total = placed_like_parameters(total, program.layout.mesh)
    return total, loss, sums
