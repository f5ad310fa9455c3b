"""Labels with a type of advantages of their own: each group by its label's rule, and by nothing of the others."""

from __future__ import annotations

import numpy as np

from common.algorithms.advantages import advantages, informative
from common.algorithms.by_label import group_advantages, informative_groups
from common.config.method import AdvantageConfig

LABELS = ["safety", "math", "safety", "math"]
TOTALS = np.array([[1.0] + [0.0] * 7, [1.0] + [0.0] * 7, [0.1] + [0.0] * 7, [0.1] + [0.0] * 7])
ARRAYS = (TOTALS, TOTALS[..., None], np.ones((4, 8, 1), bool), np.ones((4, 1)))


def test_a_bare_refusal_is_pushed_less_than_a_good_answer_where_the_label_says_so() -> None:
    config = AdvantageConfig(type="group_std", labels={"safety": "group_mean"})
    found = group_advantages(config, LABELS, *ARRAYS)
    np.testing.assert_allclose(found[[0, 2], 0], [0.875, 0.0875])
    np.testing.assert_allclose(found[1], found[3], rtol=1e-4)  # what a standard deviation erases


def test_each_type_sees_its_own_groups_alone() -> None:
    rng = np.random.default_rng(0)
    totals = rng.normal(size=(4, 8))
    arrays = (totals, totals[..., None], np.ones((4, 8, 1), bool), np.ones((4, 1)))
    config = AdvantageConfig(type="group_mean_batch_std", labels={"safety": "gdpo", "math": "rloo"})
    found = group_advantages(config, LABELS, *arrays)
    for label, kind in config.labels.items():
        rows = [index for index, other in enumerate(LABELS) if other == label]
        alone = advantages(AdvantageConfig(type=kind), *(array[rows] for array in arrays))
        np.testing.assert_array_equal(found[rows], alone)


def test_without_labels_it_is_the_plain_rule() -> None:
    config = AdvantageConfig(type="group_std")
    np.testing.assert_array_equal(group_advantages(config, LABELS, *ARRAYS), advantages(config, *ARRAYS))
    np.testing.assert_array_equal(informative_groups(config, LABELS, *ARRAYS), informative(config, *ARRAYS))


def test_equal_failures_teach_where_the_label_has_a_floor() -> None:
    totals = np.zeros((2, 4))
    arrays = (totals, totals[..., None], np.ones((2, 4, 1), bool), np.ones((2, 1)))
    config = AdvantageConfig(type="group_std", labels={"safety": "floor"})
    assert informative_groups(config, ["safety", "math"], *arrays).tolist() == [True, False]
    assert informative_groups(config, [], *(array[:0] for array in arrays)).tolist() == []
