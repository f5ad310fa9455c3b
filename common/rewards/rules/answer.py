r"""Is the final answer right? The last \boxed{} after the reasoning, or a bare answer, against the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple

from common.rewards.rules.math_process import MathProcess
from common.rewards.verifier import Verifier
from common.types import Missing, Prompt, Sample, Score

Extract = Literal["boxed", "boxed_or_bare"]

# Texts beyond these are no answers. The math worker's parser takes exponential time in the depth of the brackets, and
# a policy that stammers brackets should be wrong, not missing.
LONGEST = 300
DEEPEST = 10
# Powers of powers and large factorials: sympy would work them out digit by digit.
_HUGE = re.compile(r"\^[{(]*\d+[})]*\^|\^[{(]*\d{5,}|\d{4,}!|!!")

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A number does not continue a word or a number; a minus after a value is a subtraction, not a sign.
_NUMBER = re.compile(
    rf"(?<![A-Za-z\d_.])(?P<sign>(?<![)}}\]%])[-+])?"
    rf"(?:\\frac\{{(?P<over>\d+)\}}\{{(?P<under>\d+)\}}|(?P<top>{_DIGITS})(?: ?/ ?(?P<bottom>{_DIGITS}))?)"
    r"(?P<exponent>[eE][+-]?\d{1,3})?(?P<percent> ?%)?"
)
_CLOSING = re.compile(r"(?s:.*)(?:answer(?: is:?|:| =)|答案(?:[是为][:：]?|[:：]))\s*(\S.*)\Z", re.I)
# As formulas these would be a ratio, a subtraction and a division.
_TIME_OR_DATE = re.compile(r"\d:\d\d|\d{4}-\d\d?-\d\d?|\d/\d\d?/\d{2}")
# math-verify drops units; these abbreviations are told apart.
_UNITS = frozenset(["mm", "cm", "dm", "m", "km", "mg", "g", "kg", "t", "ml", "l", "ms", "s", "min", "h"])
_UNIT = re.compile(r"\d ?(?:\\(?:text|mathrm)\{ ?)?([A-Za-z]+) ?\}?(\^\{?[23]\}?)?\Z")
_FUNCTION = re.compile(
    r"\\[A-Za-z]+(?:\{[^{}]*\})?|\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|mod|max|min|gcd|lcm|inf)\b"
)
_GROUPED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_TIDY = [
    (r"(?<=\d)(?:\{,\}\\?!?|,\\!)(?=\d{3}(?!\d))", ""),  # in LaTeX a comma of thousands and of nothing else
    (r"(?<!\\)\\[()\[\]!,;: ]|\\?[$€£¥]|\\(?:left|right|displaystyle)\b", ""),
    (r"\\[dt]frac\b", r"\\frac"),
    (r"\\%", "%"),
    (r"\{,\}", ","),
    (r"[−–]", "-"),
    (r"^([*_]+)([^*_](?:.*[^*_])?)\1$", r"\2"),
    (r"^\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}$", r"\1"),
    (r"^\(([A-Za-z])\)$", r"\1"),
    (r"\s+", " "),
]
_CLOSING_MARKS = ".。,;；，"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched; None if there is none or the last is not closed."""
    starts = [found.end() for found in re.finditer(r"\\boxed\s*\{", text)]
    if not starts:
        return None
    content = text[starts[-1] :]
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", content):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return content[: brace.start()]
    return None


def reference_answer(reference: object) -> str:
    r"""The normalised final answer of a reference: its last \boxed{}, what follows GSM8K's "####", or all of it."""
    text = str(reference)
    boxed = last_boxed(text)
    return normalise(text.rpartition("####")[2] if boxed is None else boxed)


def normalise(text: str) -> str:
    """The text without what does not change its value: math delimiters, emphasis, a leading "=", a final period."""
    text = text.translate(_FULL_WIDTH)
    for pattern, replacement in _TIDY:
        text = re.sub(pattern, replacement, text.strip().rstrip(_CLOSING_MARKS))
    return text.removeprefix("=").strip().rstrip(_CLOSING_MARKS)


class Number(NamedTuple):
    """A number as written: "12%" is 12 with a percent sign."""

    value: Fraction
    percent: bool

    def equals(self, other: Number) -> bool:
        """Exactly, but for the rounding of decimals (1/3 and 0.333333). 12% equals 12 and 0.12."""
        if self.percent == other.percent:
            return _close(self.value, other.value)
        part, whole = (self.value, other.value) if self.percent else (other.value, self.value)
        return _close(part, whole) or _close(part / 100, whole)


def _close(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) <= min(max(abs(one), abs(other)), 1) / 10**6


def _as_number(found: re.Match[str]) -> Number | None:
    top, bottom = found["over"] or found["top"], found["under"] or found["bottom"] or "1"
    numerator, denominator = (Fraction(part.replace(",", "")) for part in (top, bottom))
    if not denominator:
        return None
    scale = Fraction(f"1{found['exponent'] or ''}")
    sign = -1 if found["sign"] == "-" else 1
    return Number(sign * numerator / denominator * scale, found["percent"] is not None)


def read_number(text: str) -> Number | None:
    """The number that a normalised text is: "1,234.50", "-3/4", "12%"; None if it is anything else."""
    found = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    return _as_number(found) if found else None


def bare_answers(text: str, reference: str) -> list[str]:
    """What may be meant as the answer in a text without a box.

    The last number if the reference is a number, otherwise what follows a closing "the answer is", and the whole text.
    """
    text = text.replace("**", "").replace("__", "").strip()
    if read_number(normalise(reference)):
        return [found[0] for found in _NUMBER.finditer(normalise(text))][-1:]
    closing = _CLOSING.match(text)  # anchored: `search` would try every start
    return [*([closing[1]] if closing else []), text]


def _prose_words(text: str) -> int:
    """Words of a text that is read as formula: three letters or more that are no function and no LaTeX command."""
    return len(re.findall(r"[^\W\d_]{3,}", _FUNCTION.sub(" ", text)))


def _is_formula(reference: str, answer: str) -> bool:
    """May the two be compared mathematically? As products of letters, "listen" and "silent" would be equal."""
    if _prose_words(reference) or _TIME_OR_DATE.search(reference):
        return False
    if len(answer) > LONGEST or _prose_words(answer) > 3 or _HUGE.search(answer):
        return False
    steps = (1 if bracket in "([{" else -1 for bracket in re.findall(r"[(){}\[\]]", answer))
    return max(accumulate(steps), default=0) <= DEEPEST


def _has_a_wrong_side(reference: str, answer: str) -> bool:
    """math-verify takes the last side of an equation, the 3 of "x = 3"; of "4 = 3" and "x = 4 = 3" it must not."""
    wanted = read_number(reference)
    sides = [read_number(side.strip()) for side in answer.split("=")]
    return wanted is not None and any(side is not None and not side.equals(wanted) for side in sides)


def _units_differ(reference: str, answer: str) -> bool:
    units = [found.groups() for found in map(_UNIT.search, (reference, answer)) if found]
    return len(units) == 2 and units[0] != units[1] and all(unit in _UNITS for unit, _ in units)


def _ungrouped(text: str) -> str:
    """The text with its thousands joined, which math-verify takes for several numbers.

    A tuple, a set and a list, which has commas of its own, stay as they are: in "5, 100,200" no comma is of thousands.
    """
    joined = _GROUPED.sub(lambda found: found[0].replace(",", ""), text)
    return text if re.search(r"[(\[,]|\\\{", joined) else joined


class AnswerMatch(Verifier):
    r"""1 if the final answer equals the reference (a text or a number), else 0.

    `extract`: "boxed" takes the last \boxed{} after the reasoning; "boxed_or_bare" takes a bare answer where there
    is no box. Compared exactly after normalisation, then as numbers, then with math-verify in a process of its own,
    `limit_s` seconds each; a comparison that runs out of time is `Missing`. A reference in words or with a time or
    date, and an answer of more than 300 characters, 10 nested brackets or with towers of powers, must match exactly.
    Units are dropped where math-verify knows them, and compared where they are abbreviations like cm and kg; any other
    belongs into \text{}. A reference may be a whole solution: its last \boxed{}, or what follows "####", is then the
    answer.
    """

    name = "answer"

    def __init__(self, extract: Extract = "boxed", limit_s: float = 5.0) -> None:
        if extract not in ("boxed", "boxed_or_bare"):
            raise ValueError(f'answer.extract = "{extract}": must be "boxed" or "boxed_or_bare".')
        if not limit_s > 0:
            raise ValueError(f"answer.limit_s = {limit_s}: must be greater than 0.")
        self.extract = extract
        self._math = MathProcess(limit_s)

    def check_reference(self, prompt: Prompt) -> None:
        """Raise ValueError unless the reference is a finite number or a text that holds an answer."""
        reference = prompt.reference
        is_number = isinstance(reference, int | float) and not isinstance(reference, bool)
        # A whole number is finite, and one of 400 digits is no float.
        if not (is_number and (isinstance(reference, int) or math.isfinite(reference))):
            answer = reference_answer(reference) if isinstance(reference, str) else ""
            if not answer or r"\boxed" in answer:
                raise ValueError(f"The reference must be a non-blank text or a finite number; got {reference!r}.")

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        compared: dict[tuple[str, str], bool | Missing] = {}  # a group often repeats an answer
        return [self._judge(sample, compared) for sample in samples]

    def close(self) -> None:
        """End the math worker."""
        self._math.close()

    def _judge(self, sample: Sample, compared: dict[tuple[str, str], bool | Missing]) -> Score | Missing:
        reference = reference_answer(sample.prompt.reference)
        text = sample.rollout.answer_text
        boxed = last_boxed(text)
        answers = [boxed] if boxed is not None else []
        if boxed is None and self.extract == "boxed_or_bare" and r"\boxed" not in text:
            answers = bare_answers(text, reference)
        answers = [answer for answer in map(normalise, answers) if answer]
        if not answers:
            return Score(0.0, f'no answer found, reference "{reference}"')
        failure = None
        for answer in answers:
            equal = self._equal(reference, answer, compared)
            if isinstance(equal, Missing):
                failure = equal
            elif equal:
                return Score(1.0, f'answer "{answer[:LONGEST]}" equals reference "{reference}"')
        return failure or Score(0.0, f'answer "{answers[0][:LONGEST]}" differs from reference "{reference}"')

    def _equal(self, reference: str, answer: str, compared: dict[tuple[str, str], bool | Missing]) -> bool | Missing:
        if reference.casefold() == answer.casefold():
            return True
        numbers = read_number(reference), read_number(answer)
        if numbers[0] and numbers[1]:
            return numbers[0].equals(numbers[1])
        if (
            _has_a_wrong_side(reference, answer)
            or _units_differ(reference, answer)
            or not _is_formula(reference, answer)
        ):
            return False
        if (reference, answer) not in compared:
            compared[reference, answer] = self._math.equal(_ungrouped(reference), _ungrouped(answer))
        return compared[reference, answer]
