"""TorchTrainer: the PolicyTrainer of `common/trainer.py` on PyTorch."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.algorithms.objective import Sums, TokenArrays, add_sums, objective, update_record
from common.config import LossConfig, RunConfig
from common.trainer import NonFiniteUpdate, Response, Sampling, SamplingPrompt
from common.types import TrainBatch
from safework_torch.checkpoint import restore_state, save_state
from safework_torch.config import TorchSection
from safework_torch.model import head, hidden_states, load_model, recompute
from safework_torch.optimizer import AdamW
from safework_torch.sampling import sample
from safework_torch.token_logprobs import token_logprobs


class TorchTrainer:
    """A Hugging Face causal LM with fp32 master weights on one device, its AdamW state, and the reference model."""

    def __init__(self, config: RunConfig, section: TorchSection, policy: Path, reference: Path | None) -> None:
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.backend.dtype]
        self._policy = load_model(policy, self._device)
        recompute(self._policy, config.backend.recompute)
        if section.compile:
            for layer in self._policy.model.layers:
                layer.compile()
        self._reference = None if reference is None else load_model(reference, self._device).requires_grad_(False)
        self._optimizer = AdamW(dict(self._policy.named_parameters()), config.optimizer)

    def update(self, batch: TrainBatch, learning_rate: float) -> dict[str, float]:
        """One optimizer step; see PolicyTrainer."""
        loss, sums = self._accumulate(batch, self._config.loss)
        norm = self._optimizer.gradient_norm()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._optimizer.zero_grad()
            raise NonFiniteUpdate(f"loss {loss}, gradient norm {norm}.")
        self._optimizer.step(norm, learning_rate)
        self._optimizer.zero_grad()
        return update_record(sums, norm)

    def _accumulate(self, batch: TrainBatch, loss_config: LossConfig) -> tuple[float, Sums]:
        """Sum the gradient of the whole batch into `.grad`; returns the loss and its statistics as floats."""
        total, sums = 0.0, None
        for rows in self._microbatches(batch):
            logprobs, entropy = self._logprobs(self._policy, rows)
            loss, part = objective(loss_config, logprobs, entropy, token_arrays(rows))
            loss.backward()
            total += float(loss.detach())
            sums = part if sums is None else add_sums(sums, part)
        assert sums is not None, "a batch has rows"
        return total, Sums(*(float(value) for value in sums))

    @torch.no_grad()
    def logprobs(self, batch: TrainBatch, which: Literal["policy", "reference"]) -> np.ndarray:
        """float32 [B T] of the policy or the reference; see PolicyTrainer."""
        model = self._policy if which == "policy" else self._reference
        assert model is not None, "loss.kl_coef is 0, so no reference was loaded"
        return np.concatenate([self._logprobs(model, rows)[0].cpu().numpy() for rows in self._microbatches(batch)])

    def _microbatches(self, batch: TrainBatch) -> Iterator[dict[str, Tensor]]:
        """The batch's arrays on the device, `rows_per_microbatch` rows at a time."""
        size = self._config.batch.rows_per_microbatch
        arrays = {name: array for name, array in vars(batch).items() if array is not None}
        for start in range(0, len(batch.token_ids), size):
            yield {
                name: torch.from_numpy(array[start : start + size]).to(self._device) for name, array in arrays.items()
            }

    def _logprobs(self, model: PreTrainedModel, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tokens = rows["token_ids"].long()
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden = hidden_states(model, tokens, rows["positions"].long(), rows["segment_ids"], rows["prefix_ids"])
        hidden = hidden.to(self._dtype)
        previous, temperature = rows["previous"].long(), self._config.rollout.temperature
        return token_logprobs(hidden, head(model), tokens, previous, rows["sampled"], temperature)

    def sample(self, prompts: Sequence[SamplingPrompt], sampling: Sampling) -> list[list[Response]]:
        """Responses from the embedded sampler; see PolicyTrainer."""
        return sample(self._policy, prompts, sampling, self._dtype)

    def named_gradients(self, batch: TrainBatch, loss: LossConfig) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradient by Hugging Face name; see ParityTrainer."""
        value, _ = self._accumulate(batch, loss)
        gradients = {name: p.grad.cpu().numpy() for name, p in self._optimizer.named.items() if p.grad is not None}
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
            parameter.grad = torch.from_numpy(gradients[name]).to(self._device)
        self._optimizer.step(self._optimizer.gradient_norm(), learning_rate)
        self._optimizer.zero_grad()

    def save(self, directory: Path) -> None:
        """Parameters and moments; see PolicyTrainer."""
        save_state(self._optimizer, directory)

    def restore(self, directory: Path) -> None:
        """What `save` wrote; see PolicyTrainer."""
        restore_state(self._optimizer, directory)

    def peak_memory_gib(self) -> float:
        """Peak of the CUDA allocator, or of resident memory on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def token_arrays(rows: dict[str, Tensor]) -> TokenArrays:
    """The loss inputs among a micro-batch's arrays; optional ones are None where absent."""
    return TokenArrays(*(rows.get(name) for name in TokenArrays._fields))
