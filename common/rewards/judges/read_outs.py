"""What a judge's model answered -> a score. What cannot be read has no score; it is never given a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.config.judging import ReadOutSection
from common.serving.model import JudgeModel, Question
from common.types import Asked, Missing, Score

_NUMBER = re.compile(r"[-+]?[\d.,/]*\d[\d.,/%]*")
_DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")
_LONGEST_EVIDENCE = 200


def ask(section: ReadOutSection, model: JudgeModel, questions: Sequence[Question]) -> list[Score | Missing]:
    """One score per question, in order, as the read-out's type has it."""
    match section.type:
        case "verdict" | "number":
            texts = model.generate(questions, section.max_tokens)
            return [
                _with(asked, text if isinstance(text, Missing) else read_text(section, text)) for text, asked in texts
            ]
        case "labels":
            found = model.label_logprobs(questions, list(section.verdicts))
        case "classes" | "scalar":
            found = model.head(questions)
    return [
        _with(asked, values if isinstance(values, Missing) else read_values(section, values)) for values, asked in found
    ]


def _with(asked: Asked, result: Score | Missing) -> Score | Missing:
    return replace(result, asked=asked)


def read_text(section: ReadOutSection, text: str) -> Score | Missing:
    """The score of what a judge wrote: its own continuation alone, so that nothing it was shown can stand for it."""
    return _verdict(section, text) if section.type == "verdict" else _number(section, text)


def _verdict(section: ReadOutSection, text: str) -> Score | Missing:
    """The verdict that begins first, the longest where several do; case does not count, whole words do."""
    longest_first = sorted(section.verdicts, key=len, reverse=True)
    # ASCII: "结论是Unsafe" holds the word Unsafe.
    pattern = "|".join(rf"(?<![A-Za-z0-9_]){re.escape(verdict)}(?![A-Za-z0-9_])" for verdict in longest_first)
    match = re.search(pattern, text, re.IGNORECASE)
    if match is None:
        return Missing(f"the judge wrote none of its verdicts but {_shown(text)}", unparsable=True)
    verdict = next(verdict for verdict in section.verdicts if verdict.casefold() == match[0].casefold())
    return Score(section.verdicts[verdict], _shown(text), verdict)


def _number(section: ReadOutSection, text: str) -> Score | Missing:
    """The first number, moved to the nearest grade, to the lower one between two; only from within their range.

    A fraction, a percentage or a decimal comma is not read: its first digits would be another number.
    """
    match = _NUMBER.search(text)
    written = "" if match is None else match[0].rstrip(".,")
    number = float(written) if _DECIMAL.fullmatch(written) else None
    if number is None or not min(section.grades) <= number <= max(section.grades):
        return Missing(f"the judge wrote no number of its scale but {_shown(text)}", unparsable=True)
    grade = min(sorted(section.grades), key=lambda grade: abs(grade - number))
    return Score(grade, _shown(text), f"{grade:g}")


def read_values(section: ReadOutSection, values: np.ndarray) -> Score | Missing:
    """The score of label logprobs or head outputs, float32 [L] or [C]."""
    if section.outputs is not None:
        if max(section.outputs) >= values.size:
            return Missing(
                f"the judge's head has {values.size} outputs, and none numbered {max(section.outputs)}", True
            )
        values = values[section.outputs]
    if not np.isfinite(values).all():
        return Missing(f"the judge's outputs are not finite ({values})", unparsable=True)
    if section.type == "scalar":
        if values.size != 1:
            return Missing(f"the judge's head has {values.size} outputs, a scalar one", unparsable=True)
        return Score(float(values[0]), f"{values[0]:.4g}")
    if values.size != len(section.verdicts):
        return Missing(f"the judge gave {values.size} outputs for {len(section.verdicts)} verdicts", unparsable=True)
    return _expected(section, values)


def _expected(section: ReadOutSection, values: np.ndarray) -> Score:
    """Softmax over the verdicts alone, in float64; then their mean score, or that of the most probable one."""
    exponents = np.exp(values.astype(np.float64) - values.max())
    probabilities = exponents / exponents.sum()
    scores = np.fromiter(section.verdicts.values(), np.float64)
    evidence = ", ".join(f"{verdict} {p:.3f}" for verdict, p in zip(section.verdicts, probabilities, strict=True))
    first = int(probabilities.argmax())
    score = scores[first] if section.hard else probabilities @ scores
    return Score(float(score), evidence, list(section.verdicts)[first])


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _LONGEST_EVIDENCE else f"{text[:_LONGEST_EVIDENCE]}…")
