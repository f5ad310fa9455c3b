"""The soft length penalty."""

import numpy as np
import pytest

from common.rewards.rules import Overlong
from common.types import Rollout, Sample, Score
from tests.common.rewards.samples import sample


def value(rule: Overlong, length: int) -> float:
    (score,) = rule.score([sample("x", num_tokens=length)])
    assert isinstance(score, Score)
    return score.value


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, 0),
        (1, 0),
        (3072, 0),
        (3073, -1 / 1024),
        (3584, -0.5),
        (4095, -1023 / 1024),
        (4096, -1),
        (4097, -1),
        (9999, -1),
    ],
)
def test_penalty(length: int, expected: float) -> None:
    assert value(Overlong(max_length=4096), length) == expected


def test_the_published_numbers() -> None:
    rule = Overlong(max_length=20480, buffer=4096)
    assert [value(rule, length) for length in (16384, 18432, 20480, 30000)] == [0, -0.5, -1, -1]


def test_factor_scales_and_zero_has_no_sign() -> None:
    rule = Overlong(max_length=10, buffer=10, factor=0.5)
    assert [value(rule, length) for length in (5, 10, 11)] == [-0.25, -0.5, -0.5]
    assert not np.signbit(value(rule, 0))


def test_only_the_policys_own_tokens_count() -> None:
    whole = sample("x", num_tokens=8)
    fields = vars(whole.rollout) | {"sampled": np.arange(8) < 2}
    assert Overlong(max_length=8, buffer=4).score([Sample(whole.prompt, Rollout(**fields))]) == [
        Score(0.0, "2 tokens, free up to 4")
    ]


@pytest.mark.parametrize("options", [{"buffer": 0}, {"buffer": 11}, {"factor": 0}, {"factor": -1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"overlong\.(buffer|factor)"):
        Overlong(max_length=10, **({"buffer": 5} | options))  # type: ignore[arg-type]
