"""The scalar that is differentiated and its statistics: worked examples, KL in reward and loss, and what may not
change them: micro-batches and padding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.algorithms.objective import Sums, TokenArrays, add_sums, objective, update_record
from common.config.method import LossConfig
from tests.common.algorithms.batches import token_arrays
from tests.common.algorithms.probe import Probe, gradient

TYPES = ("ppo_clip", "cpg", "cpgd", "gspo", "cispo", "cross_entropy")
KL_TYPES = ("k1_reward", "k2_loss", "k3_loss", "rho_k3_loss")
THOROUGH = settings(derandomize=True, deadline=None, database=None, max_examples=40)


def loss_config(kind: str = "ppo_clip", kl_type: str = "k3_loss", kl_coef: float = 0.3, **changes: Any) -> LossConfig:
    """A policy loss with a KL penalty of 0.3."""
    return LossConfig.model_validate({"type": kind, "kl_type": kl_type, "kl_coef": kl_coef, **changes})


def slope(config: LossConfig, logprobs: np.ndarray, arrays: TokenArrays) -> np.ndarray:
    """Gradient of the objective along each log-probability."""
    return gradient(lambda lp: objective(config, lp, np.zeros_like(logprobs), arrays)[0], logprobs)


# One row: a prompt token, then five tokens of ratios 1.5, 1.5, 0.5, 0.5 and 1; the last two of them weigh nothing in
# the policy term (dropped by a correction) and padding. Old logprobs are ln 0.5 = -0.6931.
OLD = math.log(0.5)
RATIOS = [1.0, 1.5, 1.5, 0.5, 0.5, 1.0, 9.0, 1.0]
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1, 0]])
SAMPLED = np.array([[0, 1, 1, 1, 1, 1, 1, 0]], bool)
WEIGHTS = np.array([[0, 0.1, 0.2, 0.3, 0.4, 0, 0, 0]])
ADVANTAGES = np.array([[0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 0]])
LOGPROBS = np.where(SAMPLED, OLD + np.log([RATIOS]), 0.0)


def example(**changes: Any) -> TokenArrays:
    """The row above; `changes` replace single arrays."""
    arrays = TokenArrays(
        sampled=SAMPLED,
        segment_ids=SEGMENTS,
        sampling_logprobs=np.where(SAMPLED, OLD, 0.0),
        advantages=ADVANTAGES,
        policy_weights=WEIGHTS,
        kl_weights=np.where(SAMPLED, 0.05, 0.0),
        old_logprobs=np.where(SAMPLED, OLD, 0.0),
        ref_logprobs=None,
    )
    return arrays._replace(**changes)


def test_loss_is_the_weighted_sum_of_token_losses() -> None:
    # Clip 0.2 / 0.3, token losses -1.3, 1.5, -0.5, 0.8: -0.13 + 0.3 - 0.15 + 0.32 = 0.34.
    config = loss_config(clip_low=0.2, clip_high=0.3)
    loss, sums = objective(config, LOGPROBS, np.zeros_like(LOGPROBS), example())
    assert float(loss) == pytest.approx(0.34, abs=1e-12)
    assert (float(sums.loss_policy), float(sums.loss_kl)) == (pytest.approx(0.34, abs=1e-12), 0.0)


def test_kl_has_its_own_weights_and_coefficient() -> None:
    # Reference twice as likely everywhere: k3 = 2 e^d - 1 - (ln 2 - ln r) with ref / pi = 2 / r for ratio r.
    # Weights 0.05 on all six sampled tokens, dropped or not; coefficient 0.3.
    ref = np.where(SAMPLED, OLD + math.log(2), 0.0)
    penalty = sum(2 / ratio - 1 - math.log(2 / ratio) for ratio in RATIOS[1:7])
    config = loss_config(clip_low=0.2, clip_high=0.3)
    loss, sums = objective(config, LOGPROBS, np.zeros_like(LOGPROBS), example(ref_logprobs=ref))
    assert float(sums.loss_kl) == pytest.approx(0.3 * 0.05 * penalty, rel=1e-12)
    assert float(loss) == pytest.approx(0.34 + 0.3 * 0.05 * penalty, rel=1e-12)


def test_k1_in_the_reward_lowers_the_advantage_by_the_old_policys_log_ratio() -> None:
    # Old twice as likely as the reference: k1 = ln 2; coefficient 0.5. A - 0.3466 in place of A. Clip 0.2 / 0.3:
    # -1.3 (1 - d), 1.5 (1 + d), -0.5 (1 - d), 0.8 (1 + d) with weights .1 .2 .3 .4:
    # -.13 + .3 - .15 + .32 = .34 and d (.13 + .3 + .15 + .32) = .9 d.
    d = 0.5 * math.log(2)
    ref = np.where(SAMPLED, OLD - math.log(2), 0.0)
    config = loss_config(kl_type="k1_reward", kl_coef=0.5, clip_low=0.2, clip_high=0.3)
    loss, sums = objective(config, LOGPROBS, np.zeros_like(LOGPROBS), example(ref_logprobs=ref))
    assert float(loss) == pytest.approx(0.34 + 0.9 * d, rel=1e-12)
    assert float(sums.loss_kl) == 0.0


@pytest.mark.parametrize("kind", ["ppo_clip", "cpg", "cpgd", "gspo", "cispo"])
def test_k1_in_the_reward_equals_k2_as_a_loss_on_policy(kind: str) -> None:
    """Sample for sample, not only on average: the same gradient at every token."""
    logprobs, _, arrays = token_arrays(1, old=False)
    arrays = arrays._replace(kl_weights=arrays.policy_weights)
    in_reward = slope(loss_config(kind, "k1_reward"), logprobs, arrays)
    as_loss = slope(loss_config(kind, "k2_loss"), logprobs, arrays)
    without = slope(loss_config(kind, kl_coef=0.0), logprobs, arrays)
    np.testing.assert_allclose(in_reward, as_loss, atol=1e-9)
    # And the difference is the penalty's: coefficient x weight x log(pi / ref).
    penalty = 0.3 * arrays.policy_weights * (logprobs - arrays.ref_logprobs)
    assert np.abs(penalty).max() > 1e-3
    np.testing.assert_allclose(in_reward - without, penalty, atol=1e-9)


@pytest.mark.parametrize("kind", TYPES)
def test_without_old_logprobs_the_policys_own_stand_in(kind: str) -> None:
    logprobs, entropy, arrays = token_arrays(2, old=False)
    config = loss_config(kind)
    loss, sums = objective(config, logprobs, entropy, arrays)
    same, _ = objective(config, logprobs, entropy, arrays._replace(old_logprobs=logprobs))
    assert float(loss) == float(same)
    np.testing.assert_array_equal(
        slope(config, logprobs, arrays), slope(config, logprobs, arrays._replace(old_logprobs=logprobs))
    )
    assert (float(sums.ratio_max), float(sums.clipped)) == (1.0, 0.0)


# Which of the four trained tokens (ratio and sign of A: 1.5 +, 1.5 -, 0.5 +, 0.5 -) the clip holds.
@pytest.mark.parametrize(
    ("kind", "clip_low", "clip_high", "clipped"),
    [
        ("ppo_clip", 0.2, 0.3, 2),
        ("ppo_clip", 0.2, 0.6, 1),
        ("ppo_clip", 0.6, 0.3, 1),
        ("ppo_clip", 0.6, 0.6, 0),
        ("cpg", 0.2, 0.3, 2),
        ("cpgd", 0.2, 0.6, 1),
        ("cispo", 1.0, 0.3, 2),  # both above, whatever their sign
        ("cispo", 1.0, 0.6, 0),
        ("cross_entropy", 0.2, 0.3, 0),
        # gspo: one sequence of ratios 1.5, 1.5, 0.5, 0.5, 1, 9, their geometric mean 5.0625^(1/6) = 1.3104. The last
        # two count though a correction dropped them from the loss. Both tokens of A > 0 are held, or none.
        ("gspo", 0.2, 0.3, 2),
        ("gspo", 0.2, 0.32, 0),
    ],
)
def test_clipped_counts_the_tokens_that_the_clip_holds(
    kind: str, clip_low: float, clip_high: float, clipped: int
) -> None:
    config = loss_config(kind, clip_low=clip_low, clip_high=clip_high)
    _, sums = objective(config, LOGPROBS, np.zeros_like(LOGPROBS), example())
    assert float(sums.clipped) == clipped


@pytest.mark.parametrize("kind", ["ppo_clip", "cpg", "gspo"])
def test_clipped_tokens_are_those_without_gradient(kind: str) -> None:
    for seed in range(4):
        logprobs, entropy, arrays = token_arrays(seed, ref=False)
        config = loss_config(kind, clip_low=0.2, clip_high=0.28)
        still = np.abs(slope(config, logprobs, arrays)) < 1e-9
        _, sums = objective(config, logprobs, entropy, arrays)
        assert float(sums.clipped) == (still & (arrays.policy_weights > 0)).sum()


def test_tokens_entropy_and_ratio_cover_trained_tokens_alone() -> None:
    entropy = np.array([[50.0, 1.0, 2.0, 3.0, 4.0, 50.0, 50.0, 50.0]])
    _, sums = objective(loss_config(), LOGPROBS, entropy, example())
    # Four tokens of weight above 0; 1 + 2 + 3 + 4; the ratio 9 is of a dropped token.
    assert (float(sums.tokens), float(sums.entropy), float(sums.ratio_max)) == (4.0, 10.0, pytest.approx(1.5))


def test_the_largest_ratio_may_be_below_one_and_is_zero_of_no_tokens() -> None:
    lower = np.where(SAMPLED, OLD + math.log(0.25), 0.0)
    _, sums = objective(loss_config(), lower, np.zeros_like(lower), example())
    assert float(sums.ratio_max) == pytest.approx(0.25)
    _, empty = objective(loss_config(), lower, np.zeros_like(lower), example(policy_weights=np.zeros_like(WEIGHTS)))
    assert (float(empty.ratio_max), float(empty.tokens), float(empty.mismatch_kl)) == (0.0, 0.0, 0.0)


def test_mismatch_is_the_kl_from_the_sampler_to_the_trainer() -> None:
    # k3 of KL(mu || old) under x ~ mu: old/mu - 1 - ln(old/mu), on all six sampled tokens, the two that a correction
    # has cut among them.
    ratio = np.array([[5.0, 2.0, 0.5, 1.0, 1.1, 7.0, 3.0, 5.0]])
    sampling = OLD - np.log(ratio)
    _, sums = objective(loss_config(), LOGPROBS, np.zeros_like(LOGPROBS), example(sampling_logprobs=sampling))
    expected = math.fsum(x - 1 - math.log(x) for x in (2.0, 0.5, 1.0, 1.1, 7.0, 3.0))
    assert float(sums.mismatch_kl) == pytest.approx(expected, rel=1e-12)
    assert (float(sums.sampled), float(sums.tokens)) == (6.0, 4.0)


def test_mismatch_is_the_policys_where_the_samplers_logprobs_stand_in_for_the_old_ones() -> None:
    arrays = example(sampling_logprobs=example().old_logprobs)
    _, sums = objective(loss_config(old_logprobs="sampler"), LOGPROBS, np.zeros_like(LOGPROBS), arrays)
    assert float(sums.mismatch_kl) == pytest.approx(math.fsum(x - 1 - math.log(x) for x in RATIOS[1:7]), rel=1e-12)


def test_mismatch_keeps_its_digits_in_float32() -> None:
    # Differences of 2^-10: exactly k3 = d^2/2 +- d^3/6 + ..., about 4.8e-7, below the rounding of exp(d) - 1 - d.
    old, sampling = np.full((1, 8), -2.0, np.float32), np.full((1, 8), -2.0 - 2.0**-10, np.float32)
    arrays = example(old_logprobs=old, sampling_logprobs=sampling, kl_weights=np.ones((1, 8), np.float32))
    _, sums = objective(loss_config(), old, old, arrays)
    d = 2.0**-10
    assert float(sums.mismatch_kl) == pytest.approx(8 * (d**2 / 2 + d**3 / 6), rel=1e-2, abs=8e-10)


def test_update_record_divides_by_trained_and_by_sampled_tokens() -> None:
    sums = Sums(0.5, 0.25, entropy=10.0, mismatch_kl=2.0, clipped=1.0, tokens=4.0, sampled=5.0, ratio_max=1.5)
    assert update_record(sums, 7.0) == {
        "loss/policy": 0.5,
        "loss/kl": 0.25,
        "policy/entropy": 2.5,
        "policy/ratio_max": 1.5,
        "policy/clip_fraction": 0.25,
        "mismatch/kl": 0.4,
        "mismatch/cut_fraction": pytest.approx(0.2),
        "grad_norm": 7.0,
        "tokens/trained": 4.0,
    }
    nothing = Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert update_record(nothing, 0.0)["policy/entropy"] == 0.0


def rows_of(arrays: TokenArrays, rows: slice) -> TokenArrays:
    """Some rows of every array."""
    return TokenArrays(*(None if array is None else array[rows] for array in arrays))


def figures(config: LossConfig, logprobs: np.ndarray, entropy: np.ndarray, arrays: TokenArrays) -> np.ndarray:
    """The loss and every statistic."""
    loss, sums = objective(config, logprobs, entropy, arrays)
    return np.array([loss, *sums], np.float64)


@THOROUGH
@given(seed=st.integers(0, 999), kind=st.sampled_from(TYPES), kl=st.sampled_from(KL_TYPES), cut=st.sampled_from([1, 2]))
def test_micro_batches_add_up(seed: int, kind: str, kl: str, cut: int) -> None:
    logprobs, entropy, arrays = token_arrays(seed)
    config = loss_config(kind, kl)
    whole, whole_sums = objective(config, logprobs, entropy, arrays)
    parts = [
        objective(config, logprobs[rows], entropy[rows], rows_of(arrays, rows))
        for rows in (slice(0, cut), slice(cut, None))
    ]
    assert float(parts[0][0] + parts[1][0]) == pytest.approx(float(whole), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(
        np.array(add_sums(parts[0][1], parts[1][1])), np.array(whole_sums), rtol=1e-9, atol=1e-12
    )


def padded(x: np.ndarray | None, rows: int, tokens: int) -> np.ndarray | None:
    """x with so many rows and columns of zeros behind it."""
    return None if x is None else np.pad(x, ((0, rows), (0, tokens)))


@THOROUGH
@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(TYPES),
    kl=st.sampled_from(KL_TYPES),
    rows=st.integers(0, 2),
    tokens=st.integers(0, 5),
)
def test_padding_changes_nothing(seed: int, kind: str, kl: str, rows: int, tokens: int) -> None:
    logprobs, entropy, arrays = token_arrays(seed)
    config = loss_config(kind, kl)
    wide = TokenArrays(*(padded(array, rows, tokens) for array in arrays))
    plain = figures(config, logprobs, entropy, arrays)
    more = figures(config, np.pad(logprobs, ((0, rows), (0, tokens))), np.pad(entropy, ((0, rows), (0, tokens))), wide)
    np.testing.assert_allclose(more, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kl", KL_TYPES)
def test_only_trained_and_penalised_tokens_have_a_gradient(kind: str, kl: str) -> None:
    logprobs, _, arrays = token_arrays(5)
    slopes = slope(loss_config(kind, kl), logprobs, arrays)
    assert (slopes[~arrays.sampled] == 0).all()
    assert np.abs(slopes[arrays.sampled]).max() > 1e-3


def test_statistics_carry_no_gradient() -> None:
    logprobs, entropy, arrays = token_arrays(6)
    up, down = logprobs + 1e-4, logprobs - 1e-4
    for kind in TYPES:
        raised, lowered = (
            objective(loss_config(kind), Probe(moved, logprobs), entropy, arrays)[1] for moved in (up, down)
        )
        assert [float(x.moved) for x in raised if isinstance(x, Probe)] == [
            float(x.moved) for x in lowered if isinstance(x, Probe)
        ]
