"""The written AdamW rule once more, in numpy and float64: what both engines' optimizers are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from common.config.method import OptimizerConfig

STEPS = 10
# name: (learning rate, changes of OptimizerConfig, size of the gradients).
CASES = {
    "clip idle": (1e-3, {"clip_norm": 1e9}, 1.0),
    "clip active": (1e-3, {"clip_norm": 0.5}, 1.0),
    "strong decay": (1e-2, {"weight_decay": 0.5}, 1.0),
    "eps as large as the gradients": (1e-3, {"eps": 1e-3}, 1e-3),
    "other betas": (1e-3, {"beta1": 0.5, "beta2": 0.999}, 0.1),
    "tiny learning rate": (1e-6, {}, 0.1),
}


@dataclass
class Reference:
    """Parameters by name with their moments. `matrices` are decayed."""

    config: OptimizerConfig
    parameters: dict[str, np.ndarray]
    matrices: frozenset[str]
    steps: int = 0
    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)

    def step(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """Clip to the global norm, then one step."""
        self.steps += 1
        config = self.config
        exact = {name: gradient.astype(np.float64) for name, gradient in gradients.items()}
        norm = np.sqrt(sum((gradient**2).sum() for gradient in exact.values()))
        for name, whole in exact.items():
            gradient = whole * config.clip_norm / norm if norm > config.clip_norm else whole
            self.first[name] = config.beta1 * self.first.get(name, 0.0) + (1 - config.beta1) * gradient
            self.second[name] = config.beta2 * self.second.get(name, 0.0) + (1 - config.beta2) * gradient**2
            mean = self.first[name] / (1 - config.beta1**self.steps)
            square = self.second[name] / (1 - config.beta2**self.steps)
            decay = config.weight_decay * self.parameters[name] if name in self.matrices else 0.0
            self.parameters[name] = self.parameters[name] - learning_rate * (
                mean / (np.sqrt(square) + config.eps) + decay
            )


def random_steps(shapes: Mapping[str, tuple[int, ...]], size: float) -> Iterator[dict[str, np.ndarray]]:
    """Gradients of `STEPS` steps, each element of its own scale."""
    for step in range(STEPS):
        rng = np.random.default_rng(100 + step)
        yield {
            name: (size * rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 0, shape)).astype(np.float32)
            for name, shape in shapes.items()
        }


def random_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """fp32 parameters of size 1."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def assert_follows(
    reference: Reference, start: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], learning_rate: float
) -> None:
    """What an fp32 optimizer made of `start` equals the reference, but for one rounding of the weight a step."""
    for name, exact in reference.parameters.items():
        roundings = 0.5 * reference.steps * np.spacing(np.maximum(abs(start[name]), abs(found[name])))
        allowed = 1.01 * roundings + 1e-4 * learning_rate * reference.steps
        assert (abs(found[name] - exact) <= allowed).all(), name
        assert (found[name] != start[name]).mean() > 0.5, name


def lost_decay(found: np.ndarray, start: np.ndarray, exact: np.ndarray, config: OptimizerConfig, rate: float) -> float:
    """How much of one step's decay of a matrix is missing, as a share: rounding noise averages out over elements."""
    decay = rate * config.weight_decay * np.abs(start.astype(np.float64)).mean()
    return float(((found - exact) * np.sign(start)).mean() / decay)
