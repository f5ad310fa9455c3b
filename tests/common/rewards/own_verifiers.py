"""Verifiers as a user writes them, named in test configs as `tests.common.rewards.own_verifiers:...`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.types import Missing, Sample, Score


def shouts(sample: Sample, limit: int = 0) -> float:
    return float(sum(letter.isupper() for letter in sample.rollout.answer_text) > limit)


def odd(sample: Sample) -> object:
    """What the text says: a number, none, a Score, or nothing that could be one."""
    choices: dict[str, object] = {
        "none": None,
        "nan": float("nan"),
        "text": "much",
        "score": Score(0.25, "a quarter"),
        "bad score": Score(float("inf"), "all of it"),
        "missing": Missing("not today"),
        "true": True,
        "digits": "0.5",
        "score of digits": Score("0.5", "a half"),  # type: ignore[arg-type]
        "numpy": Score(np.float32(0.5), "a half"),  # type: ignore[arg-type]
    }
    return choices[sample.rollout.text]


def from_file(sample: Sample, file: str) -> float | None:
    """The score that a file has for the text now; None where it has none."""
    return json.loads(Path(file).read_text()).get(sample.rollout.text)


class LengthRM:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [self.scale * len(sample.rollout.text) for sample in samples]


class OneShort(LengthRM):
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return super().__call__(samples)[:-1]
