"""Every advantage type against numbers worked out by hand and against Python's `statistics`, and its symmetries."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.algorithms.advantages import advantages, gdpo, informative
from common.config.method import AdvantageConfig

TYPES = ("group_std", "group_mean", "group_mean_batch_std", "rloo", "floor", "gdpo")
THOROUGH = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def config(kind: str, **changes: Any) -> AdvantageConfig:
    """An advantage type with an eps too small to matter, unless told otherwise."""
    return AdvantageConfig.model_validate({"type": kind, "eps": 1e-12, **changes})


def credit(kind: str, totals: list[list[float]], **changes: Any) -> np.ndarray:
    """Advantages where the total is all there is: one verifier, present everywhere, of weight 1."""
    array = np.array(totals, np.float64)
    present = np.ones((*array.shape, 1), bool)
    return advantages(config(kind, **changes), array, array[:, :, None], present, np.ones((len(array), 1)))


def test_group_std_of_one_one_zero_zero() -> None:
    # mean 1/2, squares sum to 4 x 1/4 = 1. ddof 1: std = sqrt(1/3), 0.5 x sqrt(3) = 0.8660. ddof 0: sqrt(1/4), 1.0.
    r = math.sqrt(3) / 2
    np.testing.assert_allclose(credit("group_std", [[1, 1, 0, 0]], ddof=1), [[r, r, -r, -r]], rtol=1e-11)
    np.testing.assert_allclose(credit("group_std", [[1, 1, 0, 0]], ddof=0), [[1, 1, -1, -1]], rtol=1e-11)


def test_group_std_adds_eps_outside_the_root() -> None:
    # ddof 0: std 1/2 and eps 1/2 make 1, so 0.5 / 1; inside the root it would be 0.5 / sqrt(3/4).
    np.testing.assert_allclose(credit("group_std", [[1, 1, 0, 0]], ddof=0, eps=0.5), [[0.5, 0.5, -0.5, -0.5]])


def test_each_group_has_its_own_mean_and_std() -> None:
    # [0, 2]: mean 1, std sqrt(2) (ddof 1). [10, 13]: mean 11.5, std 3/sqrt(2). Both become -+ 1/sqrt(2).
    root = 1 / math.sqrt(2)
    np.testing.assert_allclose(credit("group_std", [[0, 2], [10, 13]]), [[-root, root], [-root, root]], rtol=1e-11)


@pytest.mark.parametrize("best", [1.0, 0.1, 0.01])
def test_group_std_erases_the_size_of_the_best_score(best: float) -> None:
    # mean b/8; squares: (7b/8)^2 + 7 (b/8)^2 = 56 b^2 / 64, over 7 = b^2 / 8; std = b / sqrt(8).
    # Best: (7b/8) sqrt(8) / b = 7 sqrt(8) / 8 = 2.4749. Others: -sqrt(8) / 8 = -0.3536. No b is left.
    found = credit("group_std", [[best] + [0.0] * 7])
    np.testing.assert_allclose(found, [[2.4748737] + [-0.3535534] * 7], rtol=1e-7)


def test_group_std_orders_a_mixed_group() -> None:
    # [1, .1, .1, .1, 0, 0, 0, 0]: mean 1.3/8 = 0.1625; squares: 1.03 - 8 x 0.1625^2 = 0.81875; std = 0.3420.
    # Refusals (0.1 - 0.1625) / 0.3420 = -0.1827, unsafe -0.1625 / 0.3420 = -0.4751, good 0.8375 / 0.3420 = 2.4488.
    found = credit("group_std", [[1, 0.1, 0.1, 0.1, 0, 0, 0, 0]])
    np.testing.assert_allclose(found, [[2.44882] + [-0.18275] * 3 + [-0.47514] * 4], atol=5e-5)


@pytest.mark.parametrize("best", [1.0, 0.1, 0.01])
def test_group_mean_keeps_the_size_of_the_best_score(best: float) -> None:
    # b - b/8 = 0.875 b; 0 - b/8 = -0.125 b.
    np.testing.assert_allclose(
        credit("group_mean", [[best] + [0.0] * 7]), [[0.875 * best] + [-0.125 * best] * 7], rtol=1e-13
    )


def test_group_mean_batch_std() -> None:
    # Group means 1 and 4; all rewards 0, 2, 3, 5: mean 2.5, squares 6.25 + .25 + .25 + 6.25 = 13.
    # ddof 1: std sqrt(13/3), 1 / std = sqrt(3/13). ddof 0: sqrt(13/4), 2 / sqrt(13).
    for ddof, size in ((1, math.sqrt(3 / 13)), (0, 2 / math.sqrt(13))):
        found = credit("group_mean_batch_std", [[0, 2], [3, 5]], ddof=ddof)
        np.testing.assert_allclose(found, [[-size, size], [-size, size]], rtol=1e-11)
    # eps outside the root: std 1 (rewards 0, 2, 0, 2, ddof 0) and eps 1 make 2.
    found = credit("group_mean_batch_std", [[0, 2], [0, 2]], ddof=0, eps=1.0)
    np.testing.assert_allclose(found, [[-0.5, 0.5], [-0.5, 0.5]])


def test_rloo() -> None:
    # 6 - (3 + 0)/2 = 4.5; 3 - (6 + 0)/2 = 0; 0 - (6 + 3)/2 = -4.5. And 1 - 0 = 1, 2 - 5 = -3 in groups of two.
    np.testing.assert_allclose(credit("rloo", [[6, 3, 0], [1, 1, 4]]), [[4.5, 0, -4.5], [-1.5, -1.5, 3]])
    np.testing.assert_allclose(credit("rloo", [[1, 0], [2, 5]]), [[1, -1], [-3, 3]])


def test_floor() -> None:
    # Mean 0.5 under the threshold 0.75: baseline 0.75. Mean 1 above it: baseline 1. A failure never gains.
    found = credit("floor", [[1, 0], [2, 0], [0.1, 0.0]], floor_threshold=0.75)
    np.testing.assert_allclose(found, [[0.25, -0.75], [1, -1], [-0.65, -0.75]])


def test_floor_keeps_a_bare_refusal_from_gaining() -> None:
    found = credit("floor", [[0.1] + [0.0] * 7], floor_threshold=1.0)
    np.testing.assert_allclose(found, [[-0.9] + [-1.0] * 7])


def test_gdpo_of_two_verifiers() -> None:
    # ddof 0, P = 1, G = 2. Verifier a: 0, 2 -> -1, 1 (std 1). b: 5, 3 -> 1, -1. Weights 3 and 1: sums -2, 2.
    # Whitened over the batch (mean 0, std 2): -1, 1. Two verifiers a sample: divided by sqrt(2).
    scores = np.array([[[0.0, 5.0], [2.0, 3.0]]])
    found = gdpo(scores, np.ones((1, 2, 2), bool), np.array([[3.0, 1.0]]), 0, 1e-12)
    np.testing.assert_allclose(found, [[-1 / math.sqrt(2), 1 / math.sqrt(2)]], rtol=1e-11)


# One group of four; verifier a scores all, verifier b the first and the third only. What stands where a score is
# absent must not matter.
MIXED = np.array([[[1.0, 7.0], [1.0, -99.0], [0.0, 3.0], [0.0, 99.0]]])
PRESENT = np.array([[[True, True], [True, False], [True, True], [True, False]]])


def test_gdpo_counts_present_scores_only() -> None:
    # ddof 0. a: mean 1/2, std 1/2 -> 1, 1, -1, -1. b over {7, 3}: mean 5, std 2 -> 1, -1; absent: 0.
    # Sums 2, 1, -2, -1: mean 0, std sqrt(10/4) = s. Active 2, 1, 2, 1.
    s, r = math.sqrt(2.5), math.sqrt(2)
    found = gdpo(MIXED, PRESENT, np.ones((1, 2)), 0, 1e-12)
    np.testing.assert_allclose(found, [[2 / s / r, 1 / s, -2 / s / r, -1 / s]], rtol=1e-11)


def test_gdpo_takes_ddof_off_the_number_of_present_scores() -> None:
    # ddof 1. a: squares 4 x 1/4 = 1, std sqrt(1/3) -> +-sqrt(3)/2. b: squares 4 + 4, one degree left: std sqrt(8),
    # +-2/sqrt(8) = +-1/sqrt(2). Sums p = sqrt(3)/2 + 1/sqrt(2), q = sqrt(3)/2, -p, -q; std sqrt(2 (p^2 + q^2) / 3).
    q = math.sqrt(3) / 2
    p = q + 1 / math.sqrt(2)
    s = math.sqrt(2 * (p * p + q * q) / 3)
    found = gdpo(MIXED, PRESENT, np.ones((1, 2)), 1, 1e-12)
    np.testing.assert_allclose(found, [[p / s / math.sqrt(2), q / s, -p / s / math.sqrt(2), -q / s]], rtol=1e-11)


def test_gdpo_adds_eps_to_both_deviations() -> None:
    # ddof 0, scores 0, 2: std 1 + eps 1 -> -1/2, 1/2; whitened: std 1/2 + 1 = 3/2 -> -1/3, 1/3; one verifier.
    found = gdpo(np.array([[[0.0], [2.0]]]), np.ones((1, 2, 1), bool), np.ones((1, 1)), 0, 1.0)
    np.testing.assert_allclose(found, [[-1 / 3, 1 / 3]])


def test_gdpo_gives_labels_their_own_weights_and_counts() -> None:
    # Two groups of two, ddof 0. Group 1 has verifier a (weight 1), group 2 a and b (weights 1, 2), all 0, 2 -> -1, 1.
    # Sums -1, 1 and -3, 3: mean 0, std sqrt(20/4) = sqrt(5). Divided by 1 and by sqrt(2).
    scores = np.array([[[0.0, 5.0], [2.0, 5.0]], [[0.0, 0.0], [2.0, 2.0]]])
    present = np.array([[[True, False]] * 2, [[True, True]] * 2])
    found = gdpo(scores, present, np.array([[1.0, 0.0], [1.0, 2.0]]), 0, 1e-12)
    first, second = 1 / math.sqrt(5), 3 / math.sqrt(10)
    np.testing.assert_allclose(found, [[-first, first], [-second, second]], rtol=1e-11)


def test_gdpo_treats_a_lone_score_as_no_news() -> None:
    # b scores one sample only: nothing to compare it with, so a alone speaks: -1, 1, whitened the same; b still counts
    # as active on its sample.
    scores, present = np.array([[[0.0, 9.0], [2.0, 0.0]]]), np.array([[[True, True], [True, False]]])
    found = gdpo(scores, present, np.ones((1, 2)), 0, 1e-12)
    np.testing.assert_allclose(found, [[-1 / math.sqrt(2), 1.0]], rtol=1e-11)


INFORMATIVE = [
    # kind, totals of one group, scores (None: the totals), present, expected
    ("group_std", [1, 1, 1], None, None, False),
    ("group_std", [1, 1, 0], None, None, True),
    ("group_std", [0.3, 0.1 + 0.2, 0.3], None, None, False),  # they differ by rounding alone
    ("group_mean", [0, 0], None, None, False),
    ("group_mean_batch_std", [5, 5], None, None, False),
    ("rloo", [0, 1e-3], None, None, True),
    ("floor", [0, 0], None, None, True),  # equal failures are pushed down
    ("floor", [1, 1], None, None, False),  # equal successes at the threshold are not
    ("floor", [2, 2], None, None, False),
    # Totals are equal, each verifier's scores are not, and the other way round.
    ("gdpo", [1, 1], [[1, 0], [0, 1]], [[True, True], [True, True]], True),
    ("gdpo", [1, 0], [[1, 1], [0, 1]], [[True, True], [True, True]], True),  # one verifier is enough
    ("gdpo", [1, 2], [[1, 0], [1, 1]], [[True, False], [True, True]], False),
    ("gdpo", [1, 1], [[1, 1], [1, 1]], [[True, True], [True, True]], False),
]


@pytest.mark.parametrize(("kind", "totals", "scores", "present", "expected"), INFORMATIVE)
def test_informative(kind: str, totals: Any, scores: Any, present: Any, expected: bool) -> None:
    array = np.array([totals], np.float64)
    held = array[:, :, None] if scores is None else np.array([scores], np.float64)
    there = np.ones(held.shape, bool) if present is None else np.array([present])
    assert informative(config(kind), array, held, there, np.ones((1, held.shape[2]))).tolist() == [expected]


def test_informative_judges_each_group() -> None:
    array = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    present = np.ones((3, 2, 1), bool)
    found = informative(config("rloo"), array, array[:, :, None], present, np.ones((3, 1)))
    assert found.tolist() == [False, True, False]


def test_a_verifier_without_weight_teaches_nothing() -> None:
    scores = np.array([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    present, weights = np.ones(scores.shape, bool), np.array([[1.0, 0.0], [1.0, 0.0]])
    totals = (scores * weights[:, None, :]).sum(axis=2)
    assert informative(config("gdpo"), totals, scores, present, weights).tolist() == [False, True]
    alone = advantages(config("gdpo"), totals, scores[:, :, :1], present[:, :, :1], weights[:, :1])
    np.testing.assert_array_equal(advantages(config("gdpo"), totals, scores, present, weights), alone)


rewards = st.integers(-40, 40).map(lambda n: n / 8)
groups = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(rewards, min_size=size, max_size=size), min_size=1, max_size=4)
)


def expected(kind: str, rows: list[list[float]], ddof: int, eps: float, threshold: float) -> list[list[float]]:
    """The same by Python's `statistics`, one reward at a time."""
    spread = statistics.stdev if ddof else statistics.pstdev
    whole = spread([value for row in rows for value in row])
    rules = {
        "group_std": lambda x, row: (x - statistics.mean(row)) / (spread(row) + eps),
        "group_mean": lambda x, row: x - statistics.mean(row),
        "group_mean_batch_std": lambda x, row: (x - statistics.mean(row)) / (whole + eps),
        "rloo": lambda x, row: x - (math.fsum(row) - x) / (len(row) - 1),
        "floor": lambda x, row: x - max(statistics.mean(row), threshold),
    }
    return [[rules[kind](value, row) for value in row] for row in rows]


@THOROUGH
@given(rows=groups, kind=st.sampled_from(TYPES[:-1]), ddof=st.sampled_from([0, 1]), threshold=rewards)
def test_types_equal_pythons_statistics(rows: list[list[float]], kind: str, ddof: int, threshold: float) -> None:
    found = credit(kind, rows, ddof=ddof, eps=0.25, floor_threshold=threshold)
    np.testing.assert_allclose(found, expected(kind, rows, ddof, 0.25, threshold), rtol=1e-9, atol=1e-12)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    """Totals [P G], scores and presence [P G 2] and a generator; each sample has a score of at least one verifier."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(2, 5)))
    present = np.stack([np.ones(shape, bool), rng.random(shape) < 0.6], axis=2)
    return rng.normal(size=shape), rng.normal(size=(*shape, 2)), present, rng


@THOROUGH
@given(case=scored(), kind=st.sampled_from(TYPES))
def test_permuting_a_group_permutes_its_advantages(case: Any, kind: str) -> None:
    totals, scores, present, rng = case
    order = np.stack([rng.permutation(totals.shape[1]) for _ in totals])
    weights = rng.uniform(0.5, 2.0, (len(totals), 2))
    plain = advantages(config(kind), totals, scores, present, weights)

    def moved(x: np.ndarray) -> np.ndarray:
        return np.stack([row[places] for row, places in zip(x, order, strict=True)])

    shuffled = advantages(config(kind), moved(totals), moved(scores), moved(present), weights)
    np.testing.assert_allclose(shuffled, moved(plain), rtol=1e-9, atol=1e-11)


@THOROUGH
@given(case=scored(), kind=st.sampled_from(TYPES), shift=rewards)
def test_shifting_all_rewards_changes_no_advantage(case: Any, kind: str, shift: float) -> None:
    """`floor` needs its threshold shifted along; the others have no zero point at all."""
    totals, scores, present, rng = case
    weights = rng.uniform(0.5, 2.0, (len(totals), 2))
    plain = advantages(config(kind), totals, scores, present, weights)
    rule = config(kind, floor_threshold=1.0 + shift)
    shifted = advantages(rule, totals + shift, scores + shift, present, weights)
    np.testing.assert_allclose(shifted, plain, rtol=1e-7, atol=1e-8)


@THOROUGH
@given(case=scored())
def test_gdpo_never_sees_what_stands_in_place_of_an_absent_score(case: Any) -> None:
    totals, scores, present, rng = case
    other = np.where(present, scores, rng.normal(0.0, 100.0, scores.shape))
    weights = np.ones((len(totals), 2))
    np.testing.assert_array_equal(
        advantages(config("gdpo"), totals, scores, present, weights),
        advantages(config("gdpo"), totals, other, present, weights),
    )
    np.testing.assert_array_equal(
        informative(config("gdpo"), totals, scores, present, weights),
        informative(config("gdpo"), totals, other, present, weights),
    )


@THOROUGH
@given(case=scored(), kind=st.sampled_from(["group_std", "group_mean", "group_mean_batch_std", "rloo"]))
def test_the_advantages_of_a_group_sum_to_zero(case: Any, kind: str) -> None:
    totals, scores, present, _ = case
    found = advantages(config(kind), totals, scores, present, np.ones((len(totals), 2)))
    np.testing.assert_allclose(found.sum(axis=1), 0.0, atol=1e-9)
