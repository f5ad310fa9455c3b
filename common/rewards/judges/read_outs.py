"""What a judge's model answered -> a score. What cannot be read has no score; it is never given a number."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.config.judging import ReadOutSection
from common.data.chat import THINK_CLOSE, THINK_OPEN
from common.serving.model import JudgeModel, Question
from common.types import Asked, Missing, Score

# What may stand before an answer without being part of it: marks alone, or a word such as "Verdict:" or "得分是". Marks
# and blanks are single blanks by then, or else matching would take the cube of their number.
_LEAD = re.compile(
    r" ?(?:(?:the|my|final) )*(?:(?:verdict|answer|conclusion|judge?ment|score|grade|rating|mark"
    r"|结论|结果|判断|答案|得分|评分|分数) ?)?(?:(?:is|是|为) ?)?",
    re.IGNORECASE,
)
_NO_WORD = re.compile(r"[\W_]+")
# Before a verdict in its sentence: it is thought of, and not given.
_DOUBT = re.compile(
    r"\b(?:not|no|never|cannot|\w+n['’]t|hardly|barely|neither|nor|far from|anything but|could|might|may|whether|if"
    r"|unless|almost|nearly)\b|不|没|非|未|是否|可能|似乎",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[\s\"'”*)\]]*(?:\?|？|吗)")
_SENTENCE_END = re.compile(r"[.!?。！？\n]")
_NEGATION = re.compile(
    r"(?:\b(?:not|no|never|non|un|hardly|neither)|n't|n’t|不是|并非|不|非)(?:\s+(?:a|an|the|very|really|quite))?[\s\"'“*-]*\Z",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?[\d.,/]*\d[\d.,/%]*")
_GOES_ON = re.compile(r"\s*(?:[/⁄%½¼¾]|(?:out )?of\b|or\b|to\b|percent|e[-+]?\d|[.,]\d|[-–~]\s*\d)", re.IGNORECASE)
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
    """The score of what a judge wrote: its own continuation alone, so that nothing it was shown can stand for it, and
    nothing that it thought before it answered.
    """
    _, closed, answer = text.rpartition(THINK_CLOSE)
    if not closed and THINK_OPEN in answer:
        return Missing(f"the judge did not come to an answer in {_shown(text)}", unparsable=True)
    return _verdict(section, answer) if section.type == "verdict" else _number(section, answer)


def _lead(before: str) -> str | None:
    """The words before an answer where they are none of it; None where they are."""
    words = _NO_WORD.sub(" ", before)
    return words.strip() if _LEAD.fullmatch(words) else None


def _verdict(section: ReadOutSection, text: str) -> Score | Missing:
    """The verdict that begins first, the longest where several do; case does not count, whole words do.

    A verdict that is denied, doubted or asked about is none. Behind other words than "Verdict:" and the like it must be
    the only one: the first of several may be one that the judge quotes.
    """
    longest_first = sorted(section.verdicts, key=len, reverse=True)
    # ASCII: "结论是Unsafe" holds the word Unsafe.
    pattern = "|".join(rf"(?<![A-Za-z0-9_]){re.escape(verdict)}(?![A-Za-z0-9_])" for verdict in longest_first)
    found = list(re.finditer(pattern, text, re.IGNORECASE))
    if not found:
        return Missing(f"the judge wrote none of its verdicts but {_shown(text)}", unparsable=True)
    match, before = found[0], text[: found[0].start()]
    several = len({one[0].casefold() for one in found}) > 1
    open_to_doubt = several or _DOUBT.search(_SENTENCE_END.split(before)[-1])
    if _NEGATION.search(before) or _ASKED.match(text, match.end()) or (_lead(before) is None and open_to_doubt):
        return Missing(f"the judge denied or doubted a verdict, or named several, in {_shown(text)}", unparsable=True)
    # By the pattern's own idea of case: it takes a Turkish dotless i for an i, and casefold does not.
    verdict = next(v for v in longest_first if re.fullmatch(re.escape(v), match[0], re.IGNORECASE))
    return Score(section.verdicts[verdict], _shown(text), verdict)


def _number(section: ReadOutSection, text: str) -> Score | Missing:
    """The first number, moved to the nearest grade, to the lower one between two; only from within their range.

    A fraction, a percentage or a decimal comma is not read: its first digits would be another number. Nor is a number
    behind other words than "Score:" and the like: it may count something else. Without any, it must be the only number
    of the scale.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    found = list(_NUMBER.finditer(plain))
    lead = _lead(plain[: found[0].start()]) if found else None
    number, *others = (_of_scale(section, match[0]) for match in found) if found else [None]
    rivalled = lead == "" and any(other is not None for other in others)
    if number is None or lead is None or rivalled or _GOES_ON.match(plain[found[0].end() :]):
        return Missing(f"the judge wrote no number of its scale but {_shown(text)}", unparsable=True)
    grade = min(sorted(section.grades), key=lambda grade: abs(grade - number))
    return Score(grade, _shown(text), f"{grade:g}")


def _of_scale(section: ReadOutSection, written: str) -> float | None:
    """A number as it is written, where it is one from within the grades."""
    written = written.rstrip(".,")
    number = float(written) if _DECIMAL.fullmatch(written) else None
    return number if number is not None and min(section.grades) <= number <= max(section.grades) else None


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
