"""A judge: a verifier that asks a model about each response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.config.judging import JudgeSection
from common.rewards.judges.question import build_question, language
from common.rewards.judges.read_outs import ask
from common.rewards.verifier import Verifier
from common.serving.model import JudgeModel, Question
from common.types import Missing, Prompt, Sample, Score


@dataclass(frozen=True)
class Judge(Verifier):
    """Scores the answer of a response by what a model says of it, and with `think_aware` looks at its reasoning too.

    An empty answer has the lowest score without being asked about: a model would have to invent what to say. Where
    there is no lowest, the scalar head is asked.
    """

    name: str
    section: JudgeSection
    model: JudgeModel

    def check_reference(self, prompt: Prompt) -> None:
        """Raise ValueError when the judge's prompt needs a reference that is not there, or images it cannot show."""
        blank = prompt.reference is None or (isinstance(prompt.reference, str) and not prompt.reference.strip())
        if blank and self.section.compares:
            raise ValueError("the judge compares with a reference, and the prompt has none. Give it one.")
        if prompt.images and not self.section.images and self.section.prompt(language(prompt)).shows("query"):
            raise ValueError(
                "the prompt has images, and the judge does not see any. Choose a judge with images: true for its label."
            )

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        """One score per sample, in order."""
        answers = self._judge([(sample.prompt, sample.rollout.answer_text) for sample in samples])
        if self.section.think_aware == "off":
            return answers
        reasoning = [(sample.prompt, sample.rollout.reasoning_text or "") for sample in samples]
        thinking = [index for index, (_, text) in enumerate(reasoning) if text.strip()]
        judged = self._judge([reasoning[index] for index in thinking])
        for index, score in zip(thinking, judged, strict=True):
            answers[index] = self._both(score, answers[index])
        return answers

    def _judge(self, texts: Sequence[tuple[Prompt, str]]) -> list[Score | Missing]:
        lowest = self.section.read_out.lowest
        results: list[Score | Missing] = [Score(lowest or 0.0, "empty response")] * len(texts)
        asked = [index for index, (_, text) in enumerate(texts) if text.strip() or lowest is None]
        found = ask(self.section.read_out, self.model, [self._question(*texts[index]) for index in asked])
        for index, result in zip(asked, found, strict=True):
            results[index] = result
        return results

    def _question(self, prompt: Prompt, text: str) -> Question:
        spoken = language(prompt)
        return build_question(self.section.prompt(spoken), prompt, text.strip(), spoken)

    def _both(self, reasoning: Score | Missing, answer: Score | Missing) -> Score | Missing:
        """The answer's score with how far the reasoning's lies from it, or their product; missing when either is."""
        if isinstance(answer, Missing) or isinstance(reasoning, Missing):
            return answer if isinstance(answer, Missing) else reasoning
        value = answer.value * reasoning.value if self.section.think_aware == "on" else answer.value
        evidence = (
            f"reasoning {reasoning.value:.4g} ({reasoning.evidence}), answer {answer.value:.4g} ({answer.evidence})"
        )
        apart = abs(reasoning.value - answer.value)
        return replace(answer, value=value, evidence=evidence, disagreement=apart)
