"""The written AdamW rule in torch: eps outside the root, decoupled decay on matrices only, one global-norm clip.

Not torch.optim.AdamW: that one rounds the decayed weight before it adds the step. At a learning rate of 1e-6 the decay
of one step is less than half a unit in the last place of fp32, so it would be lost; here, as in optax, decay and step
are one sum and are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.config.method import OptimizerConfig
from safework_torch.processes import gather_objects
from safework_torch.sharding import local

# Elements updated at a time on a CPU: with all arrays of a slice in cache, memory is crossed once instead of ten times.
CPU_SLICE = 1 << 16


class AdamW:
    """fp32 moments for each named parameter, and the number of steps taken. Where parameters lie in shards, so do their
    moments; copies: how often each shard is there among the processes of the run.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig, copies: int = 1) -> None:
        self._config = config
        self._copies = copies
        self.named = dict(named)
        self.first_moment = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        self.second_moment = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        self.steps = 0

    def gradient_norm(self) -> float:
        """Global norm of the gradients.

        Row by row first: one fp32 sum over the 28 million elements of an embedding is off by a thousandth on a CPU.
        """
        rows = (torch.linalg.vector_norm(local(_gradient(parameter)), dim=-1) for parameter in self.named.values())
        own = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(row) for row in rows]))
        return math.hypot(*gather_objects(float(own))) / math.sqrt(self._copies)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, norm: float, learning_rate: float) -> None:
        """One step from gradients of global norm `norm`, scaled down to `clip_norm` if they exceed it."""
        self.steps += 1
        scale = min(1.0, self._config.clip_norm / norm) if norm > 0 else 1.0
        for name, parameter in self.named.items():
            decay = self._config.weight_decay if parameter.ndim >= 2 else 0.0
            arrays = map(local, (parameter, _gradient(parameter), self.first_moment[name], self.second_moment[name]))
            size = CPU_SLICE if parameter.device.type == "cpu" else parameter.numel()
            for p, g, m, v in zip(*(array.view(-1).split(size) for array in arrays), strict=True):
                self._step_slice(p, g * scale, m, v, decay, learning_rate)

    def _step_slice(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, decay: float, learning_rate: float) -> None:
        config = self._config
        m.mul_(config.beta1).add_(g, alpha=1.0 - config.beta1)
        v.mul_(config.beta2).addcmul_(g, g, value=1.0 - config.beta2)
        root = (v / (1.0 - config.beta2**self.steps)).sqrt_().add_(config.eps)
        direction = (m / (1.0 - config.beta1**self.steps)).div_(root).add_(p, alpha=decay)
        p.add_(direction, alpha=-learning_rate)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "every parameter takes part in every update"
    return parameter.grad
