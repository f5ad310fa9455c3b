"""Token weights and importance corrections against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.algorithms.weights import importance_weights, sequence_weights
from common.config.method import ImportanceConfig


def test_token_mean() -> None:
    # 1 + 3 + 4 = 8 tokens, each 1/8.
    np.testing.assert_allclose(sequence_weights("token_mean", np.array([1, 3, 4]), 9, 100), [1 / 8] * 3)


def test_sequence_mean() -> None:
    # Three sequences, 1/3 each, spread over their tokens: 1/3, 1/9, 1/12.
    np.testing.assert_allclose(sequence_weights("sequence_mean", np.array([1, 3, 4]), 9, 100), [1 / 3, 1 / 9, 1 / 12])


def test_fixed_length_counts_sequences_before_drops() -> None:
    # 1 / (100 x 9), though three sequences are left.
    np.testing.assert_allclose(sequence_weights("fixed_length", np.array([1, 3, 4]), 9, 100), [1 / 900] * 3)


@settings(derandomize=True, deadline=None, database=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9), dropped=st.integers(0, 5))
def test_weights_sum_as_promised(lengths: list[int], dropped: int) -> None:
    array, before = np.array(lengths), len(lengths) + dropped
    for mode in ("token_mean", "sequence_mean"):
        assert float((array * sequence_weights(mode, array, before, 50)).sum()) == pytest.approx(1.0, rel=1e-12)
    fixed = (array * sequence_weights("fixed_length", array, before, 50)).sum()
    assert float(fixed) == pytest.approx(sum(lengths) / (50 * before), rel=1e-12)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_a_sequence_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one trained token"):
        sequence_weights("token_mean", np.array(lengths, int), 2, 10)


# Row 0: segment 1 with a prompt token, ratios 2 and 4; segment 2 with ratios 0.25 and 1.5. Row 1: segment 1 with
# ratio 3, then padding. The prompt's and the padding's own numbers must not matter.
SEGMENTS = np.array([[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]])
SAMPLED = np.array([[0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
RATIO = np.array([[7.0, 2.0, 4.0, 0.25, 1.5], [3.0, 0.1, 9.0, 9.0, 9.0]])


def factors(**settings: Any) -> np.ndarray:
    """Importance weights of the tokens above."""
    sampling = np.full(RATIO.shape, -1.5)
    config = ImportanceConfig.model_validate(settings)
    return importance_weights(config, sampling + np.log(RATIO), sampling, SAMPLED, SEGMENTS)


def test_no_correction() -> None:
    np.testing.assert_array_equal(factors(type="none"), np.ones((2, 5)))


def test_token_tis_caps_each_ratio() -> None:
    np.testing.assert_allclose(factors(type="token_tis", cap=2.5), [[1, 2, 2.5, 0.25, 1.5], [2.5, 1, 1, 1, 1]])


def test_sequence_tis_caps_each_product() -> None:
    # 2 x 4 = 8 and 0.25 x 1.5 = 0.375 in row 0, 3 in row 1; cap 5, then cap 2.
    np.testing.assert_allclose(factors(type="sequence_tis", cap=5), [[1, 5, 5, 0.375, 0.375], [3, 1, 1, 1, 1]])
    np.testing.assert_allclose(factors(type="sequence_tis", cap=2), [[1, 2, 2, 0.375, 0.375], [2, 1, 1, 1, 1]])


def test_icepop_keeps_ratios_inside_its_band_and_drops_the_rest() -> None:
    found = factors(type="icepop", low=0.5, high=3.5)
    np.testing.assert_allclose(found, [[1, 2, 0, 0, 1.5], [3, 1, 1, 1, 1]])


def test_icepop_includes_both_ends_of_its_band() -> None:
    old = np.log(np.array([[0.5, 2.0]]))
    config = ImportanceConfig(type="icepop", low=0.5, high=2.0)
    found = importance_weights(config, old, np.zeros((1, 2)), np.ones((1, 2), bool), np.ones((1, 2), int))
    np.testing.assert_allclose(found, [[0.5, 2.0]])


def test_a_long_response_does_not_overflow() -> None:
    # 4,000 tokens, each e times likelier: e^4000 is no float, the cap is.
    shape = (1, 4000)
    config = ImportanceConfig(type="sequence_tis", cap=2.0)
    found = importance_weights(config, np.ones(shape), np.zeros(shape), np.ones(shape, bool), np.ones(shape, int))
    np.testing.assert_array_equal(found, np.full(shape, math.exp(math.log(2.0))))


def test_float32_logprobs_give_float64_factors() -> None:
    sampling = np.zeros((1, 1), np.float32)
    config = ImportanceConfig(type="token_tis", cap=2.0)
    found = importance_weights(config, sampling - 1, sampling, np.ones((1, 1), bool), np.ones((1, 1), np.int32))
    assert found.dtype == np.float64
    assert float(found[0, 0]) == pytest.approx(math.exp(-1.0), rel=1e-12)
