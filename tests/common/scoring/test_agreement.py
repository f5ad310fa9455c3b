"""The arithmetic of agreement against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from common.scoring.agreement import accuracy, confusion, correlation, largest_distance, macro_f1, mean_distance

ABC = ("a", "b", "c")

# name: (given, judged, accuracy, macro F1)
TABLES = {
    "all agree": ("aabc", ["a", "a", "b", "c"], 1.0, 1.0),
    "none agrees": ("ab", ["b", "a"], 0.0, 0.0),
    # a: 2 x 1 / (2 + 1) = 2/3; b: 2 x 1 / (1 + 2) = 2/3; c neither given nor judged
    "one of three": ("aab", ["a", "b", "b"], 2 / 3, 2 / 3),
    # a: 2 x 2 / (3 + 2) = 0.8; b: 2 x 1 / (1 + 1) = 1; c judged and never given: 0
    "a class that was never given": ("aaab", ["a", "a", "c", "b"], 0.75, 0.6),
    # a: 2 x 1 / (1 + 1) = 1; b given and never judged: 0
    "a class that was never judged": ("ab", ["a", None], 0.5, 0.5),
    # a: 2 x 1 / (2 + 1) = 2/3
    "no verdict agrees with none": ("aa", ["a", None], 0.5, 2 / 3),
    "no verdicts at all": ("ab", [None, None], 0.0, 0.0),
    "nothing given": ("", [], None, None),
    # a: 2 x 3 / (4 + 3) = 6/7; b: 2 x 1 / (1 + 2) = 2/3; c: 2 x 0 / (1 + 1) = 0
    "three classes": ("aaaabc", ["a", "a", "a", "b", "b", "c"], 5 / 6, (6 / 7 + 2 / 3 + 1) / 3),
}


@pytest.mark.parametrize("name", TABLES)
def test_accuracy_and_macro_f1(name: str) -> None:
    given, judged, right, f1 = TABLES[name]
    counts = confusion(given, judged, ABC)
    assert accuracy(counts) == (None if right is None else pytest.approx(right))
    assert macro_f1(counts) == (None if f1 is None else pytest.approx(f1))


def test_a_confusion_table() -> None:
    counts = confusion("aabbc", ["a", "b", "b", None, "a"], ABC)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]
    assert confusion("", [], ()).shape == (0, 1)
    assert macro_f1(confusion("", [], ())) is None


# name: (first, second, mean distance, largest, correlation)
NUMBERS: dict[str, tuple[list[float], list[float], float | None, float | None, float | None]] = {
    "equal": ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0], 0.0, 0.0, 1.0),
    "opposite": ([0.0, 1.0], [1.0, 0.0], 1.0, 1.0, -1.0),
    "scaled": ([0.0, 1.0, 2.0], [1.0, 3.0, 5.0], 2.0, 3.0, 1.0),
    # deviations (-1, 0, 1) and (-2/3, 1/3, 1/3): 1 / sqrt(2 x 2/3) = sqrt(3)/2
    "half way": ([0.0, 1.0, 2.0], [0.0, 1.0, 1.0], 1 / 3, 1.0, 3**0.5 / 2),
    # 0.1 three times has a mean that is not quite 0.1
    "one does not vary": ([0.1, 0.1, 0.1], [0.0, 0.5, 1.0], (0.1 + 0.4 + 0.9) / 3, 0.9, None),
    "a single pair": ([0.25], [1.0], 0.75, 0.75, None),
    "none": ([], [], None, None, None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_distances_and_correlation(name: str) -> None:
    first, second, mean, largest, correlated = NUMBERS[name]
    assert mean_distance(first, second) == (None if mean is None else pytest.approx(mean))
    assert largest_distance(first, second) == (None if largest is None else pytest.approx(largest))
    for found in (correlation(first, second), correlation(second, first)):
        assert found == (None if correlated is None else pytest.approx(correlated))


def test_correlation_stays_in_its_range() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-9, 1.0, 1e9):
        numbers = (scale * rng.normal(size=100)).tolist()
        assert correlation(numbers, numbers) == pytest.approx(1.0)
