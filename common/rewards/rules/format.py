"""Does the response keep to the form of a reasoning model: one think block, then an answer?

Only the response is looked at, never the prompt: a system prompt that shows the form would otherwise earn the reward.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from common.rewards.verifier import Verifier
from common.types import Missing, Rollout, Sample, Score, Transcript

THINK, END_THINK = "<think>", "</think>"


def is_blank(text: str) -> bool:
    """True without a letter, digit, punctuation mark or symbol; zero-width characters do not fill a text."""
    return not any(unicodedata.category(character)[0] in "LNPS" for character in text)


def _form_fault(rollout: Rollout | Transcript) -> str | None:
    """What breaks the form, or None. The opening tag may be missing: some chat templates put it into the prompt."""
    before, tag, _ = rollout.text.partition(THINK)
    if rollout.reasoning_text is None:
        return "no closed think block"
    if rollout.text.count(THINK) > 1 or rollout.text.count(END_THINK) > 1:
        return "more than one think tag"
    if tag and not is_blank(before):
        return "text before the think block"
    if is_blank(rollout.reasoning_text):
        return "empty think block"
    return "no answer after the think block" if is_blank(rollout.answer_text) else None


class ThinkFormat(Verifier):
    """1 if the response is one non-empty think block followed by a non-blank answer, else 0."""

    name = "think_format"

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        faults = [_form_fault(sample.rollout) for sample in samples]
        return [Score(0.0, fault) if fault else Score(1.0, "think block, then answer") for fault in faults]


class TaskFormat(Verifier):
    r"""1 if the think block ends before the first \boxed and the answer holds one, else 0 (gsm8k, geo3k)."""

    name = "task_format"

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        return [self._judge(sample.rollout) for sample in samples]

    def _judge(self, rollout: Rollout | Transcript) -> Score:
        if rollout.reasoning_text is None:
            return Score(0.0, "no closed think block")
        if r"\boxed" in rollout.reasoning_text:
            return Score(0.0, r"\boxed inside the think block")
        boxed = r"\boxed" in rollout.answer_text
        return Score(float(boxed), r"think block, then \boxed" if boxed else r"no \boxed after the think block")
