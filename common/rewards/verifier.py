"""What every verifier, judge or rule, offers to the scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.types import Missing, Prompt, Sample, Score


class Verifier(Protocol):
    """Scores responses. A rule that needs no reference or holds no process inherits the last two members as they are.

    `name` is the verifier's name in a recipe, in metrics and in errors.
    """

    name: str

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        """One result per sample, in order. `Missing` says why a response could not be judged; it is never a number."""
        ...

    def check_reference(self, prompt: Prompt) -> None:
        """Raise ValueError, in one sentence, if the verifier cannot work with the prompt. Called once, at data load."""
        return

    def close(self) -> None:
        """Release what the verifier holds. Scoring after it is allowed and starts anew."""
        return
