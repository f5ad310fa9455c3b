"""The written AdamW rule in torch: eps outside the root, decoupled decay on matrices only, one global-norm clip;
and the average of the weights that follows it.

Not torch.optim.AdamW: that one rounds the decayed weight before it adds the step. At a learning rate of 1e-6 the decay
of one step is less than half a unit in the last place of fp32, so it would be lost; here, as in optax, decay and step
are one sum and are rounded once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.config.method import OptimizerConfig
from safework_torch.sharding import local, sent

# Elements updated at a time on a CPU: with all arrays of a slice in cache, memory is crossed once instead of ten times.
CPU_SLICE = 1 << 16
# Weight, gradient, first and second moment of each parameter; all but the gradient are changed.
_Arrays = Sequence[Sequence[Tensor]]


class Numbers(NamedTuple):
    """What one step does to all elements alike; on a GPU scalars there, so that new ones compile nothing anew and the
    host waits for none.
    """

    scale: float | Tensor
    first_correction: float | Tensor
    second_correction: float | Tensor
    rate: float | Tensor


class AdamW:
    """fp32 moments of the part of each named parameter that this process holds, and the number of steps taken, which
    the owner counts: only later is it known whether one was.

    device: where steps are computed; what rests in host memory comes there for the step of its layer. copies: how often
    each part is there among the processes of the run. offload: moments rest in host memory.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        device: torch.device,
        copies: int = 1,
        *,
        offload: bool = False,
    ) -> None:
        self._config = config
        self._device = device
        self._travels = offload or any(parameter.device.type != device.type for parameter in named.values())
        self._copies = copies
        self.named = dict(named)
        self.first_moment, self.second_moment = (
            {name: _zeros(local(parameter.detach()), device, offload) for name, parameter in named.items()}
            for _ in range(2)
        )
        self.steps = 0
        self._layers = [list(names) for _, names in groupby(self.named, _layer_of)]

    def own_norm(self) -> Tensor:
        """Norm of this process's parts of the gradients, fp32 scalar."""
        return _norm([local(_gradient(parameter)) for parameter in self.named.values()])

    def norm_of(self, parts: Tensor) -> Tensor:
        """Norm of the gradients, float64 scalar, from `own_norm` of every process, float64 [P]."""
        return torch.linalg.vector_norm(parts) / math.sqrt(self._copies)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, norm: Tensor, are_finite: Tensor, learning_rate: float) -> None:
        """One step from gradients of global norm `norm`, float64 scalar, scaled down to `clip_norm` if they exceed it;
        where they are not finite, bool scalar, nothing changes. The host does not wait for a GPU to know either, unless
        something rests with the host.
        """
        config, steps = self._config, self.steps + 1
        scale = (torch.full_like(norm, config.clip_norm) / norm).clamp(max=1.0)  # of a norm of 0 too
        known = (1.0 - config.beta1**steps, 1.0 - config.beta2**steps, learning_rate)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            numbers = Numbers(scale.float(), *sent(np.array(known, np.float32), self._device).unbind())
        else:
            numbers = Numbers(float(scale), *known)
        step = _compiled() if on_gpu else _step_in_slices
        for names in self._layers:
            decays = [config.weight_decay if self.named[name].ndim >= 2 else 0.0 for name in names]
            arrays = [self._on_device(name) for name in names]
            step(arrays, decays, numbers, config, are_finite)
            for name, (weight, _, first, second) in zip(names, arrays, strict=True):
                _rest(weight, local(self.named[name]))
                _rest(first, self.first_moment[name])
                _rest(second, self.second_moment[name])
        if on_gpu and self._travels:
            torch.cuda.current_stream().synchronize()  # the last may be on their way to the host

    def _on_device(self, name: str) -> list[Tensor]:
        """The parts of a weight, its gradient and its moments that this process holds."""
        own = local(self.named[name]), local(_gradient(self.named[name]))
        moments = self.first_moment[name], self.second_moment[name]
        return [array.to(self._device, non_blocking=True) for array in (*own, *moments)]


def _zeros(like: Tensor, device: torch.device, offload: bool) -> Tensor:
    if not offload:
        return torch.zeros_like(like, device=device)
    return torch.zeros_like(like, device="cpu", pin_memory=device.type == "cuda")


def _rest(array: Tensor, resting: Tensor) -> None:
    if array is not resting:
        resting.copy_(array, non_blocking=True)


def _norm(arrays: list[Tensor]) -> Tensor:
    if arrays[0].is_cuda:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(arrays)))  # pyright: ignore[reportPrivateImportUsage]
    # Row by row first: one fp32 sum over the 28 million elements of an embedding is off by a thousandth on a CPU.
    rows = (torch.linalg.vector_norm(array, dim=-1) for array in arrays)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(row) for row in rows]))


def _layer_of(name: str) -> str:
    layer = re.match(r".*?layers\.\d+\.", name)
    return layer[0] if layer else name


def _step_in_slices(
    arrays: _Arrays, decays: Sequence[float], numbers: Numbers, config: OptimizerConfig, are_finite: Tensor
) -> None:
    if not are_finite:
        return
    for whole, decay in zip(arrays, decays, strict=True):
        for part in zip(*(array.view(-1).split(CPU_SLICE) for array in whole), strict=True):
            _step([part], [decay], numbers, config)


def _step(arrays: _Arrays, decays: Sequence[float], numbers: Numbers, config: OptimizerConfig) -> None:
    for (p, gradient, m, v), decay in zip(arrays, decays, strict=True):
        g = gradient * numbers.scale
        m.mul_(config.beta1).add_(g, alpha=1.0 - config.beta1)
        v.mul_(config.beta2).addcmul_(g, g, value=1.0 - config.beta2)
        root = (v / numbers.second_correction).sqrt_().add_(config.eps)
        direction = (m / numbers.first_correction).div_(root).add_(p, alpha=decay)
        p.sub_(direction.mul_(numbers.rate))


def step_if_finite(
    arrays: _Arrays, decays: Sequence[float], numbers: Numbers, config: OptimizerConfig, are_finite: Tensor
) -> None:
    """`_step`, of which the device decides whether anything comes."""
    before = [[array.clone() for array in (p, m, v)] for p, _, m, v in arrays]
    _step(arrays, decays, numbers, config)
    for (p, _, m, v), were in zip(arrays, before, strict=True):
        for array, was in zip((p, m, v), were, strict=True):
            array.copy_(torch.where(are_finite, array, was))


@cache
def _compiled() -> Callable[..., None]:
    """On a GPU all of a layer's arrays are read and written once."""
    return torch.compile(step_if_finite)


class Average:
    """The average of the weights by the rule of `EmaSection` (`common/config/run.py`): fp32, in shards as they are."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float, every: int) -> None:
        self._named, self._decay, self._every = named, decay, every
        self.weights: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in named.items()}

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """Take in the weights as they are after `steps` optimizer steps, if that is one of those that count."""
        if steps % self._every == 0:
            for name, weight in self._named.items():
                own = local(self.weights[name])
                own.add_(local(weight.detach()) - own, alpha=1.0 - self._decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the weights of the model, a tensor at a time."""
        for name, weight in self._named.items():
            model, average = local(weight.detach()), local(self.weights[name])
            kept = model.clone()
            model.copy_(average)
            average.copy_(kept)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "every trained parameter takes part in every update"
    return parameter.grad
