"""One source, four ways to run it: the objective on numpy, torch, compiled torch and jitted jax gives the same loss,
statistics and gradients, in float64, for every policy loss and every KL penalty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common import arrays
from common.algorithms.objective import Sums, TokenArrays, objective
from common.config.method import LossConfig
from safework_torch.main import _segment_sum
from tests.common.algorithms.batches import token_arrays
from tests.common.algorithms.probe import gradient
from tests.training import COMPILER

TYPES = ("ppo_clip", "cpg", "cpgd", "gspo", "cispo", "cross_entropy")
KL_TYPES = ("k1_reward", "k2_loss", "k3_loss", "rho_k3_loss")
# Every policy loss, every penalty; the pairs share no term, so the whole product would show no more.
KINDS = [(kind, "k3_loss") for kind in TYPES] + [("ppo_clip", kl) for kl in KL_TYPES if kl != "k3_loss"]
CONFIGS = tuple(LossConfig.model_validate({"type": kind, "kl_type": kl, "kl_coef": 0.3}) for kind, kl in KINDS)

arrays.register(arrays.Engine(torch.Tensor, torch, torch.Tensor.detach, _segment_sum))
arrays.register(arrays.Engine(jax.Array, jnp, jax.lax.stop_gradient, jax.ops.segment_sum))


class Answer(NamedTuple):
    """Of each config: the loss, the statistics in the order of `Sums`, the gradient [B T]."""

    losses: np.ndarray
    sums: np.ndarray
    gradients: np.ndarray


def on_numpy(logprobs: np.ndarray, entropy: np.ndarray, constants: TokenArrays) -> Answer:
    """Gradients by central finite differences, so exact to about 1e-9."""
    found = [objective(config, logprobs, entropy, constants) for config in CONFIGS]
    slopes = [gradient(lambda lp, c=config: objective(c, lp, entropy, constants)[0], logprobs) for config in CONFIGS]
    return Answer(np.array([loss for loss, _ in found]), np.array([sums for _, sums in found]), np.array(slopes))


def on_torch(logprobs: np.ndarray, entropy: np.ndarray, constants: TokenArrays, compiled: bool) -> Answer:
    """Each config has log-probabilities of its own, so that one backward pass gives every gradient."""
    held = TokenArrays(*(None if x is None else torch.from_numpy(x) for x in constants))
    own = torch.from_numpy(np.stack([logprobs] * len(CONFIGS))).requires_grad_()

    def all_configs(stacked: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, list[Sums]]:
        found = [objective(config, lp, spread, held) for config, lp in zip(CONFIGS, stacked, strict=True)]
        return torch.stack([loss for loss, _ in found]), [sums for _, sums in found]

    run = torch.compile(all_configs, fullgraph=True, backend=COMPILER) if compiled else all_configs
    losses, sums = run(own, torch.from_numpy(entropy))
    losses.sum().backward()
    assert own.grad is not None
    return Answer(losses.detach().numpy(), np.array([[float(x) for x in row] for row in sums]), own.grad.numpy())


def on_jax(logprobs: np.ndarray, entropy: np.ndarray, constants: TokenArrays) -> Answer:
    """Jitted, the constants traced as well."""

    @jax.jit
    def all_configs(
        lp: jax.Array, spread: jax.Array, held: TokenArrays
    ) -> list[tuple[tuple[jax.Array, Sums], jax.Array]]:
        return [jax.value_and_grad(objective, 1, has_aux=True)(config, lp, spread, held) for config in CONFIGS]

    with jax.enable_x64(True):
        found = all_configs(logprobs, entropy, constants)
        losses = np.array([loss for (loss, _), _ in found])
        return Answer(losses, np.array([sums for (_, sums), _ in found]), np.array([grad for _, grad in found]))


@pytest.fixture(scope="module", params=[True, False], ids=["off-policy", "on-policy"])
def case(request: pytest.FixtureRequest) -> tuple[tuple[np.ndarray, np.ndarray, TokenArrays], Answer]:
    """A batch with or without old log-probabilities, and what numpy makes of it."""
    batch = token_arrays(11, old=request.param)
    return batch, on_numpy(*batch)


def assert_same(found: Answer, expected: Answer) -> None:
    """Losses and statistics to the last digits; gradients as far as finite differences go."""
    assert found.losses.dtype == found.gradients.dtype == np.float64
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.gradients, expected.gradients, rtol=1e-7, atol=1e-9)


def test_torch_equals_numpy(case: tuple[tuple[np.ndarray, np.ndarray, TokenArrays], Answer]) -> None:
    batch, expected = case
    assert np.abs(expected.gradients).max(axis=(1, 2)).min() > 1e-3
    assert_same(on_torch(*batch, compiled=False), expected)


def test_compiled_torch_equals_numpy(case: tuple[tuple[np.ndarray, np.ndarray, TokenArrays], Answer]) -> None:
    batch, expected = case
    assert_same(on_torch(*batch, compiled=True), expected)


def test_jitted_jax_equals_numpy(case: tuple[tuple[np.ndarray, np.ndarray, TokenArrays], Answer]) -> None:
    batch, expected = case
    assert_same(on_jax(*batch), expected)


def test_torch_and_jax_gradients_are_equal(case: tuple[tuple[np.ndarray, np.ndarray, TokenArrays], Answer]) -> None:
    """Both differentiate exactly, so they agree to the last few digits."""
    batch, _ = case
    ours, theirs = on_torch(*batch, compiled=False), on_jax(*batch)
    np.testing.assert_allclose(ours.gradients, theirs.gradients, rtol=1e-12, atol=1e-15)


def test_sums_may_be_mixed_over_micro_batches_on_every_engine() -> None:
    """`sequence_sum` takes what each engine holds: int32 ids, float32 values."""
    values, ids = np.arange(8, dtype=np.float32).reshape(2, 4), np.array([[1, 1, 2, 2], [1, 0, 0, 0]], np.int32)
    expected = [[1, 1, 5, 5], [4, 18, 18, 18]]
    for convert in (np.asarray, torch.from_numpy, jnp.asarray):
        found = arrays.sequence_sum(convert(values), convert(ids))
        assert str(found.dtype).endswith("float32")
        np.testing.assert_array_equal(np.asarray(found), expected)
