"""JaxTrainer: the PolicyTrainer of `common/trainer.py` on JAX."""

from __future__ import annotations

import functools
import math
import operator
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.algorithms.objective import Sums, TokenArrays, add_sums, objective, update_record
from common.config import LossConfig, RunConfig
from common.trainer import NonFiniteUpdate, Response, Sampling, SamplingPrompt
from common.types import TrainBatch, TrainingState
from safework_jax import optimizer, programs
from safework_jax.checkpoint import named, restore_state, snapshot, stacked
from safework_jax.config import JaxSection
from safework_jax.model import load_model
from safework_jax.models.decoder.text import Params
from safework_jax.programs import Arrays, program_for
from safework_jax.sampling import sample
from safework_jax.sharding import host, make_mesh, parameter_sharding, place, rows_sharding


class Totals(NamedTuple):
    """What the passes of an update come to: the loss and the statistics of each micro-batch, and the gradient's norm,
    fp32 scalars on the devices.
    """

    losses: tuple[jax.Array, ...]
    norm: jax.Array
    sums: tuple[Sums, ...]

    @property
    def are_finite(self) -> jax.Array:
        """Bool scalar on the devices: whether there is a step to make."""
        return functools.reduce(operator.and_, map(jnp.isfinite, (self.norm, *self.losses)))

    def read(self) -> tuple[float, float, Sums]:
        """Loss, gradient norm and statistics on the host."""
        losses, norm, sums = jax.device_get(self)
        return sum(map(float, losses)), float(norm), Sums(*map(float, functools.reduce(add_sums, sums)))


class JaxTrainer:
    """A Flax decoder with fp32 master weights over one mesh, its AdamW state, and the reference model."""

    def __init__(self, config: RunConfig, section: JaxSection, policy: Path, reference: Path | None) -> None:
        self._config = config
        self._mesh = make_mesh(section.mesh)
        model, self._params = load_model(policy, jnp.float32, partial(parameter_sharding, mesh=self._mesh))
        self._program = program_for(config, model, self._mesh)
        self._reference = None
        if reference is not None:
            resting = partial(parameter_sharding, mesh=self._mesh, offload=config.backend.offload_reference)
            # Never trained, so that nobody reads more of it than a pass does.
            self._reference = load_model(reference, self._program.dtype, resting)
        self._moments = optimizer.init_moments(self._trained, offload=config.backend.offload_optimizer)
        self._steps = 0  # as the moments count them on the devices, which need not be asked
        rule = config.ema
        self._average = None if rule.decay is None else optimizer.Average(self._params, rule.decay, rule.every)

    @property
    def _trained(self) -> Params:
        return self._program.frozen.trained(self._params)

    def update(self, batch: TrainBatch, learning_rate: float) -> dict[str, float]:
        """One optimizer step; see PolicyTrainer. Host and devices exchange only what is sent or asked for in so many
        words."""
        with jax.transfer_guard_host_to_device("disallow"), jax.transfer_guard_device_to_host("disallow"):
            totals, gradients = self._accumulate(batch, self._config.loss)
            self._step(gradients, totals.norm, totals.are_finite, learning_rate)
            # Asked for once, after all work is handed out: the devices need not wait for the host in between.
            loss, norm, sums = totals.read()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteUpdate(f"loss {loss}, gradient norm {norm}.")
            self._count_step()
        return update_record(sums, norm)

    def _step(self, gradients: Params, norm: jax.Array, are_finite: jax.Array, learning_rate: float) -> None:
        rate = place(np.array(learning_rate, np.float32), norm.sharding)
        frozen = self._program.frozen
        trained, self._moments = optimizer.step(
            self._config.optimizer, self._trained, self._moments, gradients, norm, are_finite, rate, frozen
        )
        self._params = frozen.completed(trained, self._params)

    def _count_step(self) -> None:
        self._steps += 1
        if self._average is not None:
            self._average.follow(self._params, self._steps)

    def _accumulate(self, batch: TrainBatch, loss_config: LossConfig) -> tuple[Totals, Params]:
        """What the passes over the whole batch come to, and the gradient."""
        program = self._program._replace(loss=loss_config).for_rows(batch.segment_ids)
        gradients = programs.no_gradients(self._trained, self._mesh)
        parts = []
        for rows in self._microbatches(batch):
            gradients, *part = programs.accumulate(self._params, gradients, rows, program)
            parts.append(part)
        losses, sums = zip(*parts, strict=True)
        return Totals(losses, optimizer.global_norm(gradients), sums), gradients

    def logprobs(self, batch: TrainBatch, which: Literal["policy", "reference"]) -> np.ndarray:
        """float32 [B T] of the policy or the reference; see PolicyTrainer."""
        program, params = self._program, self._params
        if which == "reference":
            assert self._reference is not None, "loss.kl_coef is 0, so no reference was loaded"
            model, params = self._reference
            if self._config.backend.offload_reference:
                params = programs.arrived(params, self._mesh)
            program = program_for(self._config, model, self._mesh)
        program = program.for_rows(batch.segment_ids)
        parts = [programs.logprobs(params, rows, program)[0] for rows in self._microbatches(batch)]
        return np.concatenate([host(part) for part in parts])

    def _microbatches(self, batch: TrainBatch) -> Iterator[Arrays]:
        """The batch's arrays on the mesh, `rows_per_microbatch` rows at a time."""
        size, sharding = self._config.batch.rows_per_microbatch, rows_sharding(self._mesh)
        arrays = {name: array for name, array in vars(batch).items() if array is not None}
        for start in range(0, len(batch.token_ids), size):
            yield {name: place(array[start : start + size], sharding) for name, array in arrays.items()}

    def sample(self, prompts: Sequence[SamplingPrompt], sampling: Sampling) -> list[list[Response]]:
        """Responses from the embedded sampler; see PolicyTrainer."""
        return sample(self._program.decoding, self._params, prompts, sampling)

    def named_gradients(self, batch: TrainBatch, loss: LossConfig) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradient by Hugging Face name; see ParityTrainer."""
        totals, gradients = self._accumulate(batch, loss)
        value, *_ = totals.read()
        return value, named(gradients, self._program.frozen)

    def loss_gradient(self, batch: TrainBatch, loss: LossConfig, logprobs: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective at given logprobs and its gradient; see ParityTrainer."""
        constants = TokenArrays(*(getattr(batch, name) for name in TokenArrays._fields))

        def objective_of(logprobs: jax.Array) -> jax.Array:
            return objective(loss, logprobs, jnp.zeros_like(logprobs), constants)[0]

        value, gradient = jax.jit(jax.value_and_grad(objective_of))(logprobs)
        return float(value), np.asarray(gradient)

    def apply_gradients(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """One optimizer step from given gradients; see ParityTrainer."""
        tree = stacked(gradients, self._trained, self._program.frozen)
        norm = optimizer.global_norm(tree)
        are_finite = jnp.isfinite(norm)
        self._step(tree, norm, are_finite, learning_rate)
        if not are_finite:
            raise NonFiniteUpdate(f"gradient norm {float(norm)}.")
        self._count_step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the policy's place; see PolicyTrainer."""
        assert self._average is not None, "ema.decay is not set, so there is no average"
        policy, self._params = self._params, self._average.weights
        try:
            yield
        finally:
            self._params = policy

    def snapshot(self) -> TrainingState:
        """Parameters, moments and average; see PolicyTrainer."""
        return snapshot(self._params, self._moments, self._average, self._program.frozen)

    def restore(self, directory: Path) -> None:
        """What either engine has saved; see PolicyTrainer."""
        self._params, self._moments = restore_state(
            self._params, self._moments, self._average, self._program.frozen, directory
        )
        self._steps = int(jax.device_get(self._moments.count))

    def peak_memory_gib(self) -> float:
        """Peak of the device allocator, or of resident memory on a CPU."""
        stats = jax.local_devices()[0].memory_stats()
        if stats is not None and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"] / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
