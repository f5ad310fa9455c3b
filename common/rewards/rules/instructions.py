"""How many of the stated constraints does the answer meet? Decided by code, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from common.rewards.rules.constraints import parse_reference
from common.rewards.rules.format import is_blank
from common.rewards.verifier import Verifier
from common.types import Missing, Prompt, Sample, Score

Mode = Literal["share", "count", "all"]


class Instructions(Verifier):
    """The constraints in the prompt's reference, checked on the answer after the reasoning.

    `mode`: "share" of the constraints that are met (0 to 1), "count" of them (0 to their number), or "all" (1 if every
    one is met, else 0). A blank answer meets none.
    """

    name = "instructions"

    def __init__(self, mode: Mode = "share") -> None:
        if mode not in ("share", "count", "all"):
            raise ValueError(f'instructions.mode = "{mode}": must be "share", "count" or "all".')
        self.mode = mode

    def check_reference(self, prompt: Prompt) -> None:
        """Raise ValueError if the reference is no list of constraints or holds one that is not understood."""
        parse_reference(prompt.reference)

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        return [self._judge(sample) for sample in samples]

    def _judge(self, sample: Sample) -> Score:
        answer = sample.rollout.answer_text.strip()
        met: list[str] = []
        missed: list[str] = []
        for statement, check in parse_reference(sample.prompt.reference):
            (met if not is_blank(answer) and check(answer) else missed).append(statement)
        total = len(met) + len(missed)
        value = {"share": len(met) / total, "count": len(met), "all": not missed}[self.mode]
        return Score(float(value), f"met: {'; '.join(met) or 'none'} | missed: {'; '.join(missed) or 'none'}")
