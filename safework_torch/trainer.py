"""TorchTrainer: the PolicyTrainer of `common/trainer.py` on PyTorch."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.algorithms.objective import Sums, TokenArrays, add_sums, objective, update_record
from common.config import ConfigError, LossConfig, RunConfig
from common.trainer import NonFiniteUpdate, Response, Sampling, SamplingPrompt
from common.types import TrainBatch, TrainingState
from safework_torch.attention import fast_kernels
from safework_torch.checkpoint import restore_state, snapshot
from safework_torch.config import TorchSection
from safework_torch.model import Microbatch, empty_model, freeze, microbatch, packed_logprobs, prepare_layers
from safework_torch.optimizer import AdamW, Average
from safework_torch.processes import gather_objects, gather_rows, own_rows
from safework_torch.sampling import sample
from safework_torch.sharding import Arriving, Whole, full, shard_like


class Totals(NamedTuple):
    """What the passes of an update come to over all processes, float64 scalars on the device; and on its way to the
    host both of them and the statistics of each process.
    """

    loss: Tensor
    norm: Tensor
    arriving: Arriving

    @property
    def are_finite(self) -> Tensor:
        """Bool scalar on the device: whether there is a step to make."""
        return self.loss.isfinite() & self.norm.isfinite()

    def read(self) -> tuple[float, float, Sums]:
        """Loss, gradient norm and statistics on the host."""
        found = self.arriving.read()
        (loss, norm), each = found[:2].tolist(), found[2:].view(-1, len(Sums._fields))
        return loss, norm, Sums(*map(float, reduce(add_sums, (Sums(*own) for own in each))))


class TorchTrainer:
    """A Hugging Face causal LM with fp32 master weights, its AdamW state, and the reference model; on one device, or
    over all processes of the run, each with a device of its own and its share of every micro-batch's rows.
    """

    def __init__(self, config: RunConfig, section: TorchSection, policy: Path, reference: Path | None) -> None:
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._rows = own_rows()
        if config.batch.rows_per_microbatch % self._rows.shares:
            raise ConfigError(
                f"batch.rows_per_microbatch = {config.batch.rows_per_microbatch}: does not divide over the "
                f"{self._rows.shares} processes of this run. Choose a multiple of {self._rows.shares}."
            )
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.backend.dtype]
        model = empty_model(policy, torch.float32)
        freeze(model, config.model.frozen)
        prepare_layers(model, config.backend.recompute, section.compile)
        self._policy = Whole(model, section.sharding, self._dtype, offload=section.offload_parameters)
        self._policy.read(policy, self._device)
        self._reference = None
        if reference is not None:
            fixed = empty_model(reference, self._dtype).requires_grad_(False)
            prepare_layers(fixed, config.backend.recompute, section.compile)  # rounded as the policy is
            resting = config.backend.offload_reference
            self._reference = Whole(fixed, section.sharding, self._dtype, offload=resting)
            self._reference.read(reference, self._device)
        trained = {name: weight for name, weight in self._policy.masters.items() if weight.requires_grad}
        copies, offload = self._policy.copies, config.backend.offload_optimizer
        self._optimizer = AdamW(trained, config.optimizer, self._device, copies, offload=offload)
        rule = config.ema
        self._average = None if rule.decay is None else Average(self._policy.masters, rule.decay, rule.every)

    def update(self, batch: TrainBatch, learning_rate: float) -> dict[str, float]:
        """One optimizer step; see PolicyTrainer."""
        totals = self._accumulate(batch, self._config.loss)
        self._step(totals.norm, totals.are_finite, learning_rate)
        loss, norm, sums = totals.read()  # only here does the host wait, while a GPU makes the step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteUpdate(f"loss {loss}, gradient norm {norm}.")
        self._count_step()
        return update_record(sums, norm)

    def _step(self, norm: Tensor, are_finite: Tensor, learning_rate: float) -> None:
        self._optimizer.step(norm, are_finite, learning_rate)
        self._policy.follow_masters()
        self._optimizer.zero_grad()

    def _count_step(self) -> None:
        self._optimizer.steps += 1
        if self._average is not None:
            self._average.follow(self._optimizer.steps)

    def _accumulate(self, batch: TrainBatch, loss_config: LossConfig) -> Totals:
        """Sum the gradient of the whole batch into `.grad`."""
        total, sums = torch.zeros((), dtype=torch.float64, device=self._device), None
        for rows in self._microbatches(batch):
            self._policy.begin_microbatch(rows.is_last)
            with fast_kernels():  # for the backward pass too, which may compute layers again
                logprobs, entropy = self._policy(self._logprobs, rows)
                loss, part = objective(loss_config, logprobs, entropy, token_arrays(rows.arrays))
                loss.backward()
            total += loss.detach()
            sums = part if sums is None else add_sums(sums, part)
        assert sums is not None, "a batch has rows"
        own = torch.stack([value.to(total) for value in (total, self._optimizer.own_norm(), *sums)])
        parts = gather_rows(own[None])  # of all processes
        loss, norm = parts[:, 0].sum(), self._optimizer.norm_of(parts[:, 1])
        return Totals(loss, norm, Arriving(torch.cat([loss[None], norm[None], parts[:, 2:].flatten()])))

    @torch.no_grad()
    def logprobs(self, batch: TrainBatch, which: Literal["policy", "reference"]) -> np.ndarray:
        """float32 [B T] of the policy or the reference; see PolicyTrainer."""
        model = self._policy if which == "policy" else self._reference
        assert model is not None, "loss.kl_coef is 0, so no reference was loaded"
        with fast_kernels():
            parts = [gather_rows(model(self._logprobs, rows)[0]).cpu().numpy() for rows in self._microbatches(batch)]
        model.release()
        return np.concatenate(parts)

    def _microbatches(self, batch: TrainBatch) -> Iterator[Microbatch]:
        """This process's share of the batch's rows, out of `rows_per_microbatch` at a time."""
        share = self._config.batch.rows_per_microbatch // self._rows.shares
        starts = range(self._rows.number * share, len(batch.token_ids), share * self._rows.shares)
        for start in starts:
            yield microbatch(batch, slice(start, start + share), self._device, is_last=start == starts[-1])

    def _logprobs(self, model: PreTrainedModel, rows: Microbatch) -> tuple[Tensor, Tensor]:
        config = self._config
        return packed_logprobs(model, rows, config.rollout.temperature, config.backend.recompute == "none")

    def sample(self, prompts: Sequence[SamplingPrompt], sampling: Sampling) -> list[list[Response]]:
        """Responses from the embedded sampler; see PolicyTrainer."""
        own_prompts = prompts[self._rows.number :: self._rows.shares]
        with self._policy.gathered():
            own = self._policy(sample, own_prompts, sampling, self._dtype)
        parts = gather_objects(own)
        return [parts[place % len(parts)][place // len(parts)] for place in range(len(prompts))]

    def named_gradients(self, batch: TrainBatch, loss: LossConfig) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradient by Hugging Face name; see ParityTrainer."""
        value, *_ = self._accumulate(batch, loss).read()
        named = self._optimizer.named.items()
        gradients = {name: full(p.grad).cpu().numpy() for name, p in named if p.grad is not None}
        self._optimizer.zero_grad()
        return value, gradients

    def loss_gradient(self, batch: TrainBatch, loss: LossConfig, logprobs: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective at given logprobs and its gradient; see ParityTrainer."""
        leaf = torch.tensor(logprobs, requires_grad=True)
        rows = {name: torch.from_numpy(array) for name, array in vars(batch).items() if array is not None}
        value, _ = objective(loss, leaf, torch.zeros_like(leaf), token_arrays(rows))
        value.backward()
        assert leaf.grad is not None
        return float(value.detach()), leaf.grad.numpy()

    def apply_gradients(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """One optimizer step from given gradients; see ParityTrainer."""
        for name, parameter in self._optimizer.named.items():
            parameter.grad = shard_like(torch.from_numpy(gradients[name]), parameter)
        own = self._optimizer.own_norm().to(self._device, torch.float64)
        norm = self._optimizer.norm_of(gather_rows(own[None]))
        self._step(norm, norm.isfinite(), learning_rate)
        if not norm.isfinite():
            raise NonFiniteUpdate(f"gradient norm {float(norm)}.")
        self._count_step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the policy's place; see PolicyTrainer."""
        assert self._average is not None, "ema.decay is not set, so there is no average"
        self._swap(self._average)
        try:
            yield
        finally:
            self._swap(self._average)

    def _swap(self, average: Average) -> None:
        average.swap()
        self._policy.follow_masters()

    def snapshot(self) -> TrainingState:
        """Parameters, moments and average; see PolicyTrainer."""
        return snapshot(self._policy.masters, self._optimizer, self._average)

    def restore(self, directory: Path) -> None:
        """What either engine has saved; see PolicyTrainer."""
        restore_state(self._policy.masters, self._optimizer, self._average, directory)
        self._policy.follow_masters()

    def peak_memory_gib(self) -> float:
        """Peak of the CUDA allocator, or of resident memory on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def token_arrays(rows: dict[str, Tensor]) -> TokenArrays:
    """The loss inputs among a micro-batch's arrays; optional ones are None where absent."""
    return TokenArrays(*(rows.get(name) for name in TokenArrays._fields))
