"""Does the response speak the language of the question?"""

from __future__ import annotations

from collections.abc import Sequence

from common.rewards.rules import measures
from common.rewards.verifier import Verifier
from common.types import Missing, Prompt, Sample, Score


def _question(prompt: Prompt) -> str | None:
    return next((message.content for message in reversed(prompt.messages) if message.role == "user"), None)


class LanguageConsistency(Verifier):
    """1 if reasoning and answer are in the language of the last user turn, else 0.

    Told apart by script: Chinese, Latin script ("English") and other scripts; `share` of a text must be in one
    (see `measures.language`). A part without letters agrees with everything, and so does any response to a question
    that mixes languages or has no letters.
    """

    name = "language"

    def __init__(self, share: float = 0.7) -> None:
        if not 0.5 < share <= 1:
            raise ValueError(f"language.share = {share}: must be greater than 0.5 and at most 1.")
        self.share = share

    def check_reference(self, prompt: Prompt) -> None:
        """Raise ValueError if the prompt has no user turn."""
        if _question(prompt) is None:
            raise ValueError("The prompt has no user turn, so there is no language to be consistent with.")

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        return [self._judge(sample) for sample in samples]

    def _judge(self, sample: Sample) -> Score:
        asked = measures.language(_question(sample.prompt) or "", self.share)
        reasoning, answer = sample.rollout.reasoning_text, sample.rollout.answer_text
        parts = {"response": sample.rollout.text} if reasoning is None else {"reasoning": reasoning, "answer": answer}
        spoken = {part: measures.language(text, self.share) for part, text in parts.items()}
        evidence = f"question {asked or 'without letters'}" + "".join(
            f", {part} {language}" for part, language in spoken.items() if language
        )
        if not any(spoken.values()):
            return Score(1.0, f"{evidence}, response without letters")
        free = asked in (None, "mixed")
        return Score(float(free or set(spoken.values()) <= {asked, None}), evidence)
