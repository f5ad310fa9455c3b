"""Every policy loss and KL penalty: values and slopes worked out by hand, and what their gradients are on average.

Slopes are central finite differences of the code in float64 (`probe.py`); averages over x ~ pi are exact sums over a
small vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common.algorithms.losses import (
    cispo,
    cpg,
    gspo,
    k1,
    k2,
    k3,
    kl_penalty,
    policy_drift,
    policy_loss,
    ppo_clip,
    rho_k3,
    sequence_log_ratio,
)
from common.arrays import sequence_sum, stop_gradient
from common.config.method import LossConfig
from tests.common.algorithms.batches import token_arrays
from tests.common.algorithms.probe import gradient

OLD = -1.0
LOW, HIGH = 0.2, 0.3


def measure(loss: Callable[[Any], Any], logprob: float) -> tuple[float, float]:
    """(value, slope) of a per-token loss at one log-probability."""
    x = np.array([[logprob]])
    return float(loss(x)[0, 0]), float(gradient(lambda lp: loss(lp).sum(), x)[0, 0])


def at_ratio(ratio: float) -> float:
    """The log-probability whose ratio to the old policy this is."""
    return OLD + math.log(ratio)


def one(value: float) -> np.ndarray:
    """One row of one token."""
    return np.array([[value]])


# ratio, advantage, value, slope along the log-probability (d r / d lp = r). Clip 0.2 below, 0.3 above.
PPO = [
    (1.5, 2.0, -2.6, 0.0),  # above, A > 0: held at 1.3 x 2
    (1.5, -2.0, 3.0, 3.0),  # above, A < 0: -min(-3, -2.6), free to come back
    (0.5, 2.0, -1.0, -1.0),  # below, A > 0: -min(1, 1.6), free to come back
    (0.5, -2.0, 1.6, 0.0),  # below, A < 0: held at 0.8 x -2
    (1.25, 2.0, -2.5, -2.5),  # past the lower width above 1: still free
    (0.75, -2.0, 1.6, 0.0),  # within the upper width below 1: held
    (1.25, -2.0, 2.5, 2.5),
    (1.0, 2.0, -2.0, -2.0),
    (1.7, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope"), PPO)
def test_ppo_clip(ratio: float, advantage: float, value: float, slope: float) -> None:
    found = measure(lambda lp: ppo_clip(lp, one(OLD), one(advantage), LOW, HIGH), at_ratio(ratio))
    assert found == pytest.approx((value, slope), abs=1e-8)


# ratio, advantage, log of the ratio that the log-probability is held to (None: free). Value -A lp, slope -A when free.
CPG = [
    (1.5, 2.0, 1.3),
    (1.5, -2.0, None),
    (0.5, 2.0, None),
    (0.5, -2.0, 0.8),
    (1.25, 2.0, None),
    (0.75, -2.0, 0.8),
    (1.0, 2.0, None),
]


@pytest.mark.parametrize(("ratio", "advantage", "held"), CPG)
def test_cpg(ratio: float, advantage: float, held: float | None) -> None:
    found = measure(lambda lp: cpg(lp, one(OLD), one(advantage), LOW, HIGH), at_ratio(ratio))
    slope = -advantage if held is None else 0.0
    assert found == pytest.approx((-advantage * at_ratio(held or ratio), slope), abs=1e-8)


def test_cpg_without_advantage_is_zero() -> None:
    assert measure(lambda lp: cpg(lp, one(OLD), one(0.0), LOW, HIGH), at_ratio(1.1)) == (0.0, 0.0)


# ratio -> min(ratio - 1, cap 2).
@pytest.mark.parametrize(("ratio", "slope"), [(1.0, 0.0), (0.5, -0.5), (0.01, -0.99), (2.0, 1.0), (3.5, 2.0), (9, 2)])
def test_the_slope_of_the_drift_is_the_capped_excess_of_the_ratio(ratio: float, slope: float) -> None:
    value, found = measure(lambda lp: policy_drift(lp, one(OLD), 2.0), at_ratio(ratio))
    assert found == pytest.approx(slope, abs=1e-8)
    # The value is slope x lp: 0 at r = 1, of either sign, no divergence at all.
    assert value == pytest.approx(slope * at_ratio(ratio), abs=1e-12)


def test_the_drift_follows_the_forward_kl_from_the_old_policy() -> None:
    """E over x ~ old of its gradient is that of KL(old || pi), below the cap."""
    probabilities, old = softmax(THETA), REFERENCE
    slopes = gradient(lambda lp: policy_drift(lp, np.log(old)[None], 1e9).sum(), np.log(probabilities)[None])[0]
    np.testing.assert_allclose(expected_gradient(slopes, old), forward_kl_gradient(THETA, old), atol=1e-8)


def test_cpgd_is_cpg_plus_its_share_of_drift() -> None:
    config = LossConfig(type="cpgd", clip_low=LOW, clip_high=HIGH, drift_coef=0.25, drift_cap=2.0)
    for ratio, advantage, slope in ((1.5, 2.0, 0.125), (1.2, 2.0, -1.95), (9.0, -1.0, 1.5), (0.5, -2.0, -0.125)):
        # 0 + .25 x .5; -2 + .25 x .2; 1 + .25 x 2 (capped); 0 - .25 x .5
        _, found = measure(lambda lp, a=advantage: by_config(config, lp, OLD, a), at_ratio(ratio))
        assert found == pytest.approx(slope, abs=1e-8)


def by_config(config: LossConfig, lp: Any, old: float, advantage: float) -> Any:
    """The configured loss of one sampled token."""
    return policy_loss(config, lp, one(old), one(advantage), np.array([[True]]), np.array([[1]]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.5, 2.0, 1.5), (0.1, 2.0, 0.1), (9.0, 2.0, 4.0), (9.0, -2.0, 4.0)]
)
def test_cispo(ratio: float, advantage: float, weight: float) -> None:
    # Weight min(r, 1 + 3), a constant; every token keeps the slope -weight A.
    found = measure(lambda lp: cispo(lp, one(OLD), one(advantage), 3.0), at_ratio(ratio))
    assert found == pytest.approx((-weight * advantage * at_ratio(ratio), -weight * advantage), abs=1e-7)


def test_cross_entropy() -> None:
    config = LossConfig(type="cross_entropy")
    assert measure(lambda lp: by_config(config, lp, 0.0, 5.0), -0.7) == pytest.approx((0.7, -1.0), abs=1e-8)


# Two rows. Row 0: segment 1 (prompt, 2 sampled), segment 2 (prompt, 2 sampled, 1 written by the environment).
# Row 1: segment 1 again (prompt, 1 sampled), then padding, segment 0.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0]])
SAMPLED = np.array([[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0]], bool)
LOG_RATIO = np.array([[0.0, 0.5, -0.1, 0.0, -0.3, 0.1, 9.0], [0.0, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0]])
# Means over sampled tokens: (0.5 - 0.1)/2 = 0.2; (-0.3 + 0.1)/2 = -0.1 (9.0 is not the policy's); 0.7; padding 0.
MEANS = np.array([[0.2, 0.2, 0.2, -0.1, -0.1, -0.1, -0.1], [0.7, 0.7, 0, 0, 0, 0, 0]])


def test_sequence_sums_stay_within_segment_and_row() -> None:
    x = np.arange(14.0).reshape(2, 7)
    # 0+1+2 and 3+4+5+6; 7+8, and the padding's own 9+10+11+12+13.
    np.testing.assert_array_equal(sequence_sum(x, SEGMENTS), [[3, 3, 3, 18, 18, 18, 18], [15, 15, 55, 55, 55, 55, 55]])
    # As many segments as tokens is the most that a row can hold.
    np.testing.assert_array_equal(sequence_sum(x, np.tile(np.arange(1, 8), (2, 1))), x)


def test_sequence_log_ratio_is_the_mean_over_sampled_tokens() -> None:
    np.testing.assert_allclose(sequence_log_ratio(LOG_RATIO, SAMPLED, SEGMENTS), MEANS, atol=1e-15)


def test_gspo_values() -> None:
    # Clip 0.15 / 0.15: ratios e^0.2 = 1.2214 (above), e^-0.1 = 0.9048 (inside), e^0.7 = 2.0138 (above).
    # A = 1, 1, -1: -1.15, -0.9048, 2.0138.
    advantages = np.array([[1.0] * 7, [-1.0] * 7])
    found = gspo(LOG_RATIO - 2.0, np.full((2, 7), -2.0), advantages, SAMPLED, SEGMENTS, 0.15, 0.15)
    first, second, third = -1.15, -math.exp(-0.1), math.exp(0.7)
    np.testing.assert_allclose(found[SAMPLED], [first, first, second, second, third], rtol=1e-14)


def sequence_level_gspo(log_ratio: np.ndarray, advantages: np.ndarray) -> float:
    """The published objective, sequence by sequence: -sum of min(s A, clip(s) A), each sequence of weight 1."""
    total = 0.0
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        own = [t for t in range(7) if SEGMENTS[row, t] == segment and SAMPLED[row, t]]
        ratio = math.exp(sum(log_ratio[row, t] for t in own) / len(own))
        advantage = advantages[row, own[0]]
        total -= min(ratio * advantage, min(max(ratio, 0.85), 1.15) * advantage)
    return total


@pytest.mark.parametrize("signs", [(1, 1, -1), (-1, -1, 1), (1, -1, 1)])
def test_gspo_has_the_gradient_of_the_sequence_level_objective(signs: tuple[int, int, int]) -> None:
    """With token weights 1 / (sampled tokens of the sequence), token by token."""
    a, b, c = (2.0 * sign for sign in signs)
    advantages = np.array([[a, a, a, b, b, b, b], [c] * 7])
    weights = np.where(SAMPLED, [[1 / 2] * 7, [1.0] * 7], 0.0)
    old = np.full((2, 7), -2.0)

    def ours(lp: Any) -> Any:
        return (weights * gspo(lp, old, advantages, SAMPLED, SEGMENTS, 0.15, 0.15)).sum()

    slopes = np.zeros((2, 7))
    for place in np.ndindex(2, 7):
        move = np.zeros((2, 7))
        move[place] = 1e-5
        rise = sequence_level_gspo(LOG_RATIO + move, advantages) - sequence_level_gspo(LOG_RATIO - move, advantages)
        slopes[place] = rise / 2e-5
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(gradient(ours, LOG_RATIO + old), slopes, atol=1e-8)


def test_gspo_loses_no_digits_to_large_logprobs() -> None:
    """In float32 at log-probabilities near -12, where one unit in the last place is 2^-20, against clips of 3e-4."""
    old = np.full((1, 3), -12.25, np.float32)
    logprobs = old + np.array([[2.0**-12, 0.0, 0.0]], np.float32)
    everything = np.ones((1, 3), bool)
    found = gspo(logprobs, old, np.ones((1, 3), np.float32), everything, everything.astype(int), 3e-4, 4e-4)
    assert found.dtype == np.float32
    # The mean, a third of 2^-12, is 85 1/3 such units; a float32 near 1 is good to 1.2e-7, a third of a unit is 3.2e-7.
    np.testing.assert_allclose(found, -math.exp(2.0**-12 / 3), rtol=1.2e-7)


@pytest.mark.parametrize("kind", ["ppo_clip", "cpg", "cpgd", "cispo", "gspo"])
def test_at_ratio_one_every_loss_has_the_same_gradient(kind: str) -> None:
    """The plain policy gradient: -A on each sampled token."""
    logprobs, _, arrays = token_arrays(0)
    config = LossConfig.model_validate({"type": kind})

    def loss(lp: Any) -> Any:
        return policy_loss(config, lp, logprobs, arrays.advantages, arrays.sampled, arrays.segment_ids).sum()

    np.testing.assert_allclose(gradient(loss, logprobs), -arrays.advantages, atol=1e-7)


def test_stop_gradient_holds_a_value_still() -> None:
    assert gradient(lambda x: (stop_gradient(x) * x).sum(), one(3.0)) == pytest.approx(3.0)


# pi, ref, mu, then k1 = ln(pi/ref), k2 = k1^2/2, k3 = ref/pi - 1 + k1, rho k3 = pi/mu k3.
KL_VALUES = [
    (0.5, 0.25, 0.4, math.log(2), 0.2402265, 0.1931472, 0.2414340),  # .5 - 1 + .6931; x 1.25
    (0.25, 0.5, 0.5, -math.log(2), 0.2402265, 0.3068528, 0.1534264),  # 2 - 1 - .6931; x 0.5
    (0.3, 0.3, 0.6, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("pi", "ref", "mu", "first", "second", "third", "weighted"), KL_VALUES)
def test_kl_values_and_slopes(
    pi: float, ref: float, mu: float, first: float, second: float, third: float, weighted: float
) -> None:
    lp, lr, lm = math.log(pi), one(math.log(ref)), one(math.log(mu))
    assert measure(lambda x: k1(x, lr), lp) == pytest.approx((first, 1.0), abs=1e-7)
    assert measure(lambda x: k2(x, lr), lp) == pytest.approx((second, first), abs=1e-7)
    assert measure(lambda x: k3(x, lr), lp) == pytest.approx((third, 1 - ref / pi), abs=1e-7)
    slope = pi / mu * (third + 1 - ref / pi)
    assert measure(lambda x: rho_k3(x, lr, lm), lp) == pytest.approx((weighted, slope), abs=1e-7)


def test_kl_penalty_is_the_configured_one() -> None:
    lp, ref, mu = one(math.log(0.5)), one(math.log(0.25)), one(math.log(0.4))
    for kind, value in (("k2_loss", 0.2402265), ("k3_loss", 0.1931472), ("rho_k3_loss", 0.2414340)):
        found = kl_penalty(LossConfig.model_validate({"kl_type": kind}), lp, ref, mu)
        assert float(found[0, 0]) == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize(
    ("kind", "reason"), [("k1_loss", "expected gradient of zero.*use k2_loss"), ("k3_reward", "training collapses")]
)
def test_misleading_estimators_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        LossConfig.model_validate({"kl_type": kind})


THETA = np.array([0.3, -0.8, 1.1, 0.2])
REFERENCE = np.array([0.4, 0.3, 0.1, 0.2])
SAMPLER = np.array([0.1, 0.2, 0.3, 0.4])


def softmax(theta: np.ndarray) -> np.ndarray:
    """The policy of the exact averages, by its logits."""
    weights = np.exp(theta)
    return weights / weights.sum()


def expected_gradient(slopes: np.ndarray, sampler: np.ndarray) -> np.ndarray:
    """Sum over x of sampler(x) slope(x) d ln pi(x) / d theta, and d ln pi(x) / d theta_k = [x = k] - pi_k."""
    probabilities = softmax(THETA)
    score = np.eye(len(THETA)) - probabilities
    return (sampler * slopes) @ score


def reverse_kl_gradient(theta: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """d/d theta_k of sum pi ln(pi/ref) = pi_k (ln(pi_k/ref_k) - KL)."""
    pi = softmax(theta)
    log_ratio = np.log(pi / ref)
    return pi * (log_ratio - (pi * log_ratio).sum())


def forward_kl_gradient(theta: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """d/d theta_k of sum ref ln(ref/pi) = pi_k - ref_k."""
    return softmax(theta) - ref


def penalty_slopes(kind: str, sampler: np.ndarray) -> np.ndarray:
    """Slope of a KL loss at each token of the vocabulary."""
    config = LossConfig.model_validate({"kl_type": kind})
    ref, mu = np.log(REFERENCE)[None], np.log(sampler)[None]
    return gradient(lambda lp: kl_penalty(config, lp, ref, mu).sum(), np.log(softmax(THETA))[None])[0]


def test_k2_as_a_loss_follows_the_reverse_kl_on_policy() -> None:
    pi = softmax(THETA)
    found = expected_gradient(penalty_slopes("k2_loss", pi), pi)
    np.testing.assert_allclose(found, reverse_kl_gradient(THETA, REFERENCE), atol=1e-8)
    off = expected_gradient(penalty_slopes("k2_loss", SAMPLER), SAMPLER)
    assert np.abs(off - found).max() > 0.05


def test_k3_as_a_loss_follows_the_forward_kl() -> None:
    pi = softmax(THETA)
    found = expected_gradient(penalty_slopes("k3_loss", pi), pi)
    np.testing.assert_allclose(found, forward_kl_gradient(THETA, REFERENCE), atol=1e-8)


@pytest.mark.parametrize("sampler", [softmax(THETA), SAMPLER], ids=["on-policy", "off-policy"])
def test_rho_k3_follows_the_reverse_kl_whoever_sampled(sampler: np.ndarray) -> None:
    found = expected_gradient(penalty_slopes("rho_k3_loss", sampler), sampler)
    np.testing.assert_allclose(found, reverse_kl_gradient(THETA, REFERENCE), atol=1e-8)


def test_k1_in_the_reward_follows_the_reverse_kl_and_as_a_loss_goes_nowhere() -> None:
    pi = softmax(THETA)
    values = k1(np.log(pi), np.log(REFERENCE))
    np.testing.assert_allclose(expected_gradient(values, pi), reverse_kl_gradient(THETA, REFERENCE), atol=1e-12)
    slopes = gradient(lambda lp: k1(lp, np.log(REFERENCE)[None]).sum(), np.log(pi)[None])[0]
    np.testing.assert_allclose(expected_gradient(slopes, pi), 0.0, atol=1e-8)


def test_k3_in_the_reward_mixes_reverse_and_forward_kl() -> None:
    pi = softmax(THETA)
    values = k3(np.log(pi), np.log(REFERENCE))
    mixed = reverse_kl_gradient(THETA, REFERENCE) - forward_kl_gradient(THETA, REFERENCE)
    np.testing.assert_allclose(expected_gradient(values, pi), mixed, atol=1e-12)


def test_the_analytic_kl_gradients_are_slopes_of_the_kl() -> None:
    pairs: list[tuple[Callable[[np.ndarray], float], Callable[..., np.ndarray]]] = [
        (lambda t: float((softmax(t) * np.log(softmax(t) / REFERENCE)).sum()), reverse_kl_gradient),
        (lambda t: float((REFERENCE * np.log(REFERENCE / softmax(t))).sum()), forward_kl_gradient),
    ]
    for value, analytic in pairs:
        moves = np.eye(4) * 1e-5
        slopes = [(value(THETA + move) - value(THETA - move)) / 2e-5 for move in moves]
        np.testing.assert_allclose(analytic(THETA, REFERENCE), slopes, atol=1e-9)
