"""The JAX engine's AdamW against the written rule in float64, and its state saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from common.config.method import OptimizerConfig
from common.state_files import write_state
from safework_jax import optimizer
from safework_jax.checkpoint import restore_state, snapshot
from safework_jax.frozen import Frozen
from tests.adamw import CASES, Reference, assert_follows, lost_decay, random_parameters, random_steps

LAYERS = 3
ALL_TRAINED = Frozen(frozenset(), LAYERS)
# Stacked parameters have a leading layer dimension: a stacked norm is [L D] and no matrix.
SHAPES = {
    "embed.weight": (300, 260),
    "layers.mlp.up.weight": (LAYERS, 16, 8),
    "layers.attention_norm.weight": (LAYERS, 40),
    "layers.attention.query.bias": (LAYERS, 7),
    "norm.weight": (40,),
}
MATRICES = frozenset({"embed.weight", "layers.mlp.up.weight"})


def tree(arrays: Mapping[str, np.ndarray]) -> Any:
    return unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep=".")


def flat(params: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in flatten_dict(params, sep=".").items()}


class Stepped:
    """Parameters and moments, stepped in place."""

    def __init__(self, config: OptimizerConfig, start: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.params = tree(start)
        self.moments = optimizer.init_moments(self.params, offload=False)

    def step(self, gradients: Mapping[str, np.ndarray], rate: float) -> float:
        norm = optimizer.global_norm(tree(gradients))
        self.params, self.moments = optimizer.step(
            self.config, self.params, self.moments, tree(gradients), norm, jnp.isfinite(norm), rate, ALL_TRAINED
        )
        return float(norm)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_follow_the_written_rule(case: str) -> None:
    rate, changes, size = CASES[case]
    config = OptimizerConfig(**changes)
    start = random_parameters(SHAPES)
    stepped, reference = Stepped(config, start), Reference(config, dict(start), MATRICES)
    for gradients in random_steps(SHAPES, size):
        norm = stepped.step(gradients, rate)
        exact = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in gradients.values()))
        assert norm == pytest.approx(exact, rel=1e-6)
        assert (norm > config.clip_norm) == (case not in ("clip idle", "eps as large as the gradients"))
        reference.step(gradients, rate)
    assert_follows(reference, start, flat(stepped.params), rate)
    first, second = flat(stepped.moments.mu), flat(stepped.moments.nu)
    for name in SHAPES:
        np.testing.assert_allclose(first[name], reference.first[name], rtol=1e-4, atol=1e-7 * size)
        np.testing.assert_allclose(second[name], reference.second[name], rtol=1e-4)


def test_decay_survives_a_tiny_learning_rate() -> None:
    """At 1e-6 the decay of a step is far below half a unit in the last place of a weight; it must not be lost."""
    # Directions of many sizes: with equal ones, all elements of a size would round alike.
    config, rate = OptimizerConfig(eps=0.1, clip_norm=1e9), 1e-6
    start = random_parameters(SHAPES)
    stepped, reference = Stepped(config, start), Reference(config, dict(start), MATRICES)
    gradients = next(random_steps(SHAPES, 1.0))
    stepped.step(gradients, rate)
    reference.step(gradients, rate)
    name = "embed.weight"
    found, exact = flat(stepped.params)[name], reference.parameters[name]
    assert abs(lost_decay(found, start[name], exact, config, rate)) < 0.1


def test_norm_of_a_large_matrix_keeps_its_digits() -> None:
    gradient = 1e-3 * np.exp(2 * np.random.default_rng(0).standard_normal((8192, 576), np.float32))
    norm = optimizer.global_norm({"matrix": jnp.asarray(gradient)})
    assert float(norm) == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)


def test_zero_gradients_only_decay_matrices() -> None:
    start = random_parameters(SHAPES)
    stepped = Stepped(OptimizerConfig(weight_decay=0.5), start)
    assert stepped.step({name: np.zeros_like(array) for name, array in start.items()}, 0.1) == 0
    for name, array in flat(stepped.params).items():
        np.testing.assert_allclose(array, start[name] * (0.95 if name in MATRICES else 1.0), rtol=1e-6)


def test_restored_equals_never_stopped(tmp_path: Path) -> None:
    config, start = OptimizerConfig(), random_parameters(SHAPES)
    whole, first, again = Stepped(config, start), Stepped(config, start), Stepped(config, start)
    steps = list(random_steps(SHAPES, 1.0))
    for gradients in steps:
        whole.step(gradients, 1e-3)
    for gradients in steps[:4]:
        first.step(gradients, 1e-3)
    write_state(snapshot(first.params, first.moments, None, ALL_TRAINED), tmp_path)
    again.params, again.moments = restore_state(again.params, again.moments, None, ALL_TRAINED, tmp_path)
    for gradients in steps[4:]:
        again.step(gradients, 1e-3)
    assert int(again.moments.count) == len(steps)
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.moments), (whole.params, whole.moments))
