"""The torch engine's AdamW against the written rule in float64, and its state saved and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.config.method import OptimizerConfig
from common.state_files import write_state
from safework_torch.checkpoint import restore_state, snapshot
from safework_torch.optimizer import CPU_SLICE, AdamW, Numbers, step_if_finite
from tests.adamw import CASES, Reference, assert_follows, lost_decay, random_parameters, random_steps

SHAPES = {"matrix": (300, 260), "small": (3, 5), "norm": (40,), "bias": (7,)}
MATRICES = frozenset({"matrix", "small"})


def make(config: OptimizerConfig, start: Mapping[str, np.ndarray]) -> AdamW:
    named = {name: nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    return AdamW(named, config, torch.device("cpu"))


def step(optimizer: AdamW, gradients: Mapping[str, np.ndarray], learning_rate: float) -> float:
    for name, parameter in optimizer.named.items():
        parameter.grad = torch.from_numpy(gradients[name])
    norm = optimizer.norm_of(optimizer.own_norm().double()[None])
    optimizer.step(norm, torch.isfinite(norm), learning_rate)
    optimizer.zero_grad()
    optimizer.steps += 1
    return float(norm)


def values(optimizer: AdamW) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in optimizer.named.items()}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_follow_the_written_rule(case: str) -> None:
    assert np.prod(SHAPES["matrix"]) > CPU_SLICE  # the last slice is a broken one
    rate, changes, size = CASES[case]
    config = OptimizerConfig(**changes)
    start = random_parameters(SHAPES)
    optimizer, reference = make(config, start), Reference(config, dict(start), MATRICES)
    for gradients in random_steps(SHAPES, size):
        norm = step(optimizer, gradients, rate)
        exact = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in gradients.values()))
        assert norm == pytest.approx(exact, rel=1e-6)
        assert (norm > config.clip_norm) == (case not in ("clip idle", "eps as large as the gradients"))
        reference.step(gradients, rate)
    assert_follows(reference, start, values(optimizer), rate)
    for name in SHAPES:
        np.testing.assert_allclose(optimizer.first_moment[name], reference.first[name], rtol=1e-4, atol=1e-7 * size)
        np.testing.assert_allclose(optimizer.second_moment[name], reference.second[name], rtol=1e-4)


@pytest.mark.parametrize("factor", [1.0, math.inf, math.nan])
def test_where_a_gpu_decides_a_step_is_the_same_or_nothing(factor: float) -> None:
    config, rate, start = OptimizerConfig(), 1e-3, random_parameters(SHAPES)
    one, other, before = (make(config, start) for _ in range(3))
    first, second, *_ = random_steps(SHAPES, 1.0)
    for optimizer in (one, other, before):
        step(optimizer, first, rate)
    broken = {name: array * np.float32(factor) for name, array in second.items()}
    norm = step(one, broken, rate)
    numbers = Numbers(min(1.0, config.clip_norm / norm), 1.0 - config.beta1**2, 1.0 - config.beta2**2, rate)
    arrays = [[held[name] for held in arrays_of(other, broken)] for name in SHAPES]
    decays = [config.weight_decay if name in MATRICES else 0.0 for name in SHAPES]
    step_if_finite(arrays, decays, numbers, config, torch.tensor(math.isfinite(norm)))
    assert same(one, other) and same(one, before) == (factor != 1.0)


def arrays_of(optimizer: AdamW, gradients: Mapping[str, np.ndarray]) -> list[Mapping[str, torch.Tensor]]:
    weights = {name: parameter.detach() for name, parameter in optimizer.named.items()}
    given = {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}
    return [weights, given, optimizer.first_moment, optimizer.second_moment]


def same(one: AdamW, other: AdamW) -> bool:
    kinds = zip(arrays_of(one, {}), arrays_of(other, {}), strict=True)
    return all(torch.equal(ours[name], theirs[name]) for ours, theirs in kinds for name in ours)


def test_on_a_gpu_nothing_travels_that_lies_there() -> None:
    with FakeTensorMode():
        there = {"weight": nn.Parameter(torch.empty(4, 4, device="cuda:0"))}
        here = {"weight": nn.Parameter(torch.empty(4, 4))}
        gpu = torch.device("cuda")  # as the trainer names it
        assert not AdamW(there, OptimizerConfig(), gpu)._travels
        assert AdamW(here, OptimizerConfig(), gpu)._travels


def test_decay_survives_a_tiny_learning_rate() -> None:
    """At 1e-6 the decay of a step is far below half a unit in the last place of a weight; it must not be lost."""
    # Directions of many sizes: with equal ones, all elements of a size would round alike.
    config, rate = OptimizerConfig(eps=0.1, clip_norm=1e9), 1e-6
    start = random_parameters(SHAPES)
    optimizer, reference = make(config, start), Reference(config, dict(start), MATRICES)
    gradients = next(random_steps(SHAPES, 1.0))
    step(optimizer, gradients, rate)
    reference.step(gradients, rate)
    found, exact = values(optimizer)["matrix"], reference.parameters["matrix"]
    assert abs(lost_decay(found, start["matrix"], exact, config, rate)) < 0.1


def test_norm_of_a_large_matrix_keeps_its_digits() -> None:
    shape = (8192, 576)
    gradient = 1e-3 * np.exp(2 * np.random.default_rng(0).standard_normal(shape, np.float32))
    optimizer = make(OptimizerConfig(), {"matrix": np.zeros(shape, np.float32)})
    optimizer.named["matrix"].grad = torch.from_numpy(gradient)
    assert float(optimizer.own_norm()) == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)


def test_zero_gradients_only_decay_matrices() -> None:
    config, start = OptimizerConfig(weight_decay=0.5), random_parameters(SHAPES)
    optimizer = make(config, start)
    assert step(optimizer, {name: np.zeros_like(array) for name, array in start.items()}, 0.1) == 0
    for name, array in values(optimizer).items():
        np.testing.assert_allclose(array, start[name] * (0.95 if name in MATRICES else 1.0), rtol=1e-6)


def test_restored_equals_never_stopped(tmp_path: Path) -> None:
    config, start = OptimizerConfig(), random_parameters(SHAPES)
    whole, first, again = make(config, start), make(config, start), make(config, random_parameters(SHAPES))
    steps = list(random_steps(SHAPES, 1.0))
    for gradients in steps:
        step(whole, gradients, 1e-3)
    for gradients in steps[:4]:
        step(first, gradients, 1e-3)
    write_state(snapshot(first.named, first, None), tmp_path)
    restore_state(again.named, again, None, tmp_path)
    for gradients in steps[4:]:
        step(again, gradients, 1e-3)
    assert again.steps == len(steps)
    for ours, theirs in (
        (again.named, whole.named),
        (again.first_moment, whole.first_moment),
        (again.second_moment, whole.second_moment),
    ):
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
