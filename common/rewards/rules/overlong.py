"""The soft length penalty of DAPO (arXiv 2503.14476): no reward for running into the length limit."""

from __future__ import annotations

from collections.abc import Sequence

from common.rewards.verifier import Verifier
from common.types import Missing, Rollout, Sample, Score, Transcript


class Overlong(Verifier):
    """0 up to max_length - buffer tokens, then falling linearly to -factor at max_length, and -factor beyond.

    Only tokens that the policy wrote are counted. `max_length` is the response limit of the run, in tokens.
    """

    name = "overlong"

    def __init__(self, max_length: int, buffer: int = 1024, factor: float = 1.0) -> None:
        if not 0 < buffer <= max_length:
            raise ValueError(f"overlong.buffer = {buffer}: must be at least 1 and at most max_length ({max_length}).")
        if factor <= 0:
            raise ValueError(f"overlong.factor = {factor}: must be greater than 0.")
        self.max_length, self.buffer, self.factor = max_length, buffer, factor

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        return [self._judge(_length(sample.rollout)) for sample in samples]

    def _judge(self, length: int | None) -> Score | Missing:
        if length is None:
            return Missing("overlong counts tokens, and the record has no token_ids")
        excess = length - (self.max_length - self.buffer)
        share = min(max(excess, 0) / self.buffer, 1.0)
        # `0.0 - x` and not `-x`, so that a short response scores 0.0 and not -0.0
        return Score(0.0 - self.factor * share, f"{length} tokens, free up to {self.max_length - self.buffer}")


def _length(rollout: Rollout | Transcript) -> int | None:
    if isinstance(rollout, Rollout):
        return int(rollout.sampled.sum())
    return None if rollout.token_ids is None else len(rollout.token_ids)
