"""The learning rate of each update against numbers worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from common.algorithms.schedule import learning_rate
from common.config.method import OptimizerConfig


def rates(total: int, **changes: float) -> list[float]:
    """Learning rates of a whole run: peak 1, a quarter of warm-up, floor 0.1, unless told otherwise."""
    config = OptimizerConfig(**{"learning_rate": 1.0, "warmup_fraction": 0.25, "floor_fraction": 0.1} | changes)
    return [learning_rate(config, update, total) for update in range(total)]


def test_the_whole_curve() -> None:
    # 8 updates, 2 of them warm-up: 1/2, 1. Then six cosine steps, 0.1 + 0.9 (1 + cos(k 30 deg)) / 2 for k = 1 .. 6:
    # (1 + .8660254)/2 = .9330127 -> .9397114; .75 -> .775; .5 -> .55; .25 -> .325; .0669873 -> .1602886; 0 -> .1.
    expected = [0.5, 1.0, 0.9397114, 0.775, 0.55, 0.325, 0.1602886, 0.1]
    assert rates(8) == pytest.approx(expected, abs=1e-7)


def test_the_peak_scales_everything() -> None:
    assert rates(8, learning_rate=2e-6) == pytest.approx([2e-6 * rate for rate in rates(8)], rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
def test_warm_up_ends_at_the_peak_and_the_run_at_the_floor(total: int, warmup: float) -> None:
    curve = rates(total, warmup_fraction=warmup)
    num_warmup = math.ceil(Fraction(str(warmup)) * total)
    if num_warmup:
        assert curve[num_warmup - 1] == max(curve) == pytest.approx(1.0)
    if num_warmup < total:
        assert curve[-1] == min(curve[num_warmup:]) == pytest.approx(0.1)
        assert curve[num_warmup] < 1.0


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert rates(4, warmup_fraction=1.0) == [0.25, 0.5, 0.75, 1.0]


def test_a_longer_run_follows_its_own_curve() -> None:
    # 16 updates, 4 of them warm-up; update 7 is the 4th of 12 cosine steps: cos 60 deg, .75 -> .775.
    assert rates(16)[7] == pytest.approx(0.775, rel=1e-12)


def test_updates_past_the_end_stay_at_the_floor() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.25, floor_fraction=0.1)
    assert learning_rate(config, 8, 8) == learning_rate(config, 80, 8) == pytest.approx(0.1)


@pytest.mark.parametrize("percent", range(1, 100))
def test_warm_up_is_the_fraction_as_it_was_written(percent: int) -> None:
    """Whatever binary floating point makes of it: 7 % of 100 updates are 7, not 8."""
    curve = rates(100, warmup_fraction=percent / 100)
    assert curve.index(1.0) == percent - 1
