"""Reading a constraint's statement: its literals, its quantity, and one plain wording for the patterns to match.

`read("The answer must not include the words 'a' or 'b'.")` gives the wording `not the words § or §` and the literals
`a`, `b`. Subject, modal and leading verb are dropped, negations become `not ...` (Chinese: `不...`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ENGLISH = [*_ONES, "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
_CHINESE = [*"一二三四五六七八九十", *(f"十{digit}" for digit in "一二三四五六七八九"), "二十"]
_NUMERALS = {word: index for words in (_ENGLISH, _CHINESE) for index, word in enumerate(words, 1)} | {"两": 2}


def _either(words: list[str]) -> str:
    """A pattern for any of the words, the longer ones first, so that "不超过" is not read as "超过"."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


class Bound(NamedTuple):
    """An inclusive range of counts; `high` is None where there is no upper end."""

    low: int
    high: int | None

    def allows(self, count: int) -> bool:
        return self.low <= count and (self.high is None or count <= self.high)


_PHRASES: list[tuple[Callable[[int], Bound], str]] = [
    (
        lambda n: Bound(n, None),
        "at least/no fewer than/no less than/not fewer than/not less than/a minimum of/minimum/至少/不少于/不低于/最少",
    ),
    (lambda n: Bound(n + 1, None), "more than/over/多于/超过"),
    (
        lambda n: Bound(0, n),
        "at most/no more than/not more than/not exceed/a maximum of/maximum/up to/within/最多/至多/不超过/不多于",
    ),
    (lambda n: Bound(0, n - 1), "fewer than/less than/under/少于"),
    (lambda n: Bound(n, n), "exactly/恰好/正好"),
]
_BOUNDS = {phrase: bound for bound, phrases in _PHRASES for phrase in phrases.split("/")}
_SUFFIXES = {
    "or more": _BOUNDS["at least"],
    "以上": _BOUNDS["at least"],
    "or fewer": _BOUNDS["at most"],
    "or less": _BOUNDS["at most"],
    "以内": _BOUNDS["at most"],
}
_NUMBER = rf"(?:\d+|{_either(list(_NUMERALS))})"
_RANGE = rf"(?:between |range |在)?{_NUMBER} ?(?:-|–|~|to|and|到|至) ?{_NUMBER}"
QUANTITY = rf"(?:{_RANGE}|(?:(?:{_either(list(_BOUNDS))}) ?)?{_NUMBER}(?: (?:or more|or fewer|or less))?)"


def bound(quantity: str) -> Bound:
    """The range that a text fitting `QUANTITY` (with 以内 or 以上 behind it, if it was there) allows.

    Raises ValueError where it allows nothing or says two things at once ("at least 5 or fewer").
    """
    numbers = [int(word) if word.isdigit() else _NUMERALS[word] for word in re.findall(_NUMBER, quantity)]
    if len(numbers) == 2:
        result = Bound(numbers[0], numbers[1])
    else:
        limits = [_BOUNDS[phrase] for phrase in re.findall(_either(list(_BOUNDS)), quantity)]
        limits += [limit for suffix, limit in _SUFFIXES.items() if quantity.endswith(suffix)]
        if len(limits) > 1:
            raise ValueError(f'"{quantity}" says two things at once.')
        result = (limits or [_BOUNDS["exactly"]])[0](numbers[0])
    if result.high is not None and result.high < max(result.low, 0):
        raise ValueError(f'"{quantity}" allows no count at all.')
    return result


LITERAL = "§"
_LITERALS = re.compile(
    r"(?<![A-Za-z0-9_])'(?P<a>.+?)'(?![A-Za-z0-9_])|\"(?P<b>.+?)\"|“(?P<c>.+?)”|‘(?P<d>.+?)’|「(?P<e>.+?)」|`(?P<f>.+?)`|(?P<g></?[A-Za-z][\w.-]*>)"
)
_WHOLE = (
    "answer|response|output|reply|text|content|description|story|summary|essay|article|email|letter|poem|script|report"
    "|explanation|message|translation|list"
)
_SUBJECT = re.compile(
    rf"^(?:please )?(?:(?:ensure|make sure)(?: that)? )?(?:(?:the|your) (?:(?:whole|entire|final) )?(?:{_WHOLE}) ?)?"
    r"(?:(?:must|should|shall|will|has to|needs to|is to) )?"
)
_VERB = (
    r"(?:be(?: (?:formatted|written|presented|given|provided|composed|divided))?(?: (?:as|in|of|into))?"
    r"|contains?|includes?|ha(?:ve|s)|uses?|consists? of|write(?: in)?|provide|give|return|output|mentions?|is|in"
    r"|a total of) "
)
_NOT = r"(?:not|avoid(?: using)?|without(?: using)?|no(?! (?:more|fewer|less)))"
_SUBJECT_ZH = re.compile(
    r"^请?(?:确保)?(?:你的)?(?:整个|全部)?(?:回答|答案|回复|输出|全文|文章|内容|文本)?[中里]?"
    r"(?:必须|应该|应当|应|需要|需|须|要)?(?=[^a-z ]|$)"
)
_NOT_ZH = r"(?:不得|不能|不要|不可以|不可|不应该|不应|请勿|勿|禁止|避免|不(?=使用|用|包含|含|出现|提及))"
_VERB_ZH = r"(?:包含|含有|包括|使用|采用|用|出现|提及|输出|有(?!效)|为|是|控制在|限制在|分为|分成|写)(?!于)"
_AMOUNT_ZH = _either([phrase for phrase in _BOUNDS if not phrase.isascii()])


class Statement(NamedTuple):
    """`wording` is the statement in plain lower case with § for each of its `literals`."""

    wording: str
    literals: list[str]

    def match(self, *patterns: str) -> re.Match[str] | None:
        """The match of the first pattern that fits the whole wording."""
        return next((found for pattern in patterns if (found := re.fullmatch(pattern, self.wording))), None)


def _plain(text: str) -> str:
    """Lower case, one space between English words, none beside Chinese characters, no closing mark or colon."""
    text = re.sub(r"[:：]", " ", text.lower()).replace("，", ",").replace("（", "(").replace("）", ")")
    text = re.sub(r"\s+", " ", text).strip().rstrip(".。!！;； ")
    text = re.sub(r"(?<=[\u4e00-\u9fff]) | (?=[\u4e00-\u9fff])", "", text)
    return re.sub(r"\bonce\b", "1 times", re.sub(r"\btwice\b", "2 times", text))


def read(statement: str) -> Statement:
    """The plain wording of a statement. Raises ValueError if § stands outside of a literal."""
    literals: list[str] = []

    def keep(found: re.Match[str]) -> str:
        literals.append(next(group for group in found.groups() if group is not None))
        return LITERAL

    text = _plain(_LITERALS.sub(keep, statement))
    if text.count(LITERAL) != len(literals):
        raise ValueError(f'The statement "{statement}" must not hold a {LITERAL} outside of quotes.')
    text = re.sub(r"(?:\b(?:must|should|shall|may|can|do|does|is|are) ?(?:not|n['’]t)|\bcannot|\bnever)\b", "not", text)
    text = _SUBJECT.sub("", text)
    text = re.sub(rf"^(?:{_VERB})?(?:{_NOT} )(?:{_VERB})?(?:any (?:of )?)?(?!exceed)", "not ", text)
    text = re.sub(rf"^(?:{_VERB})", "", text)
    text = re.sub(rf" (?:in|throughout|of) (?:the |your )?(?:{_WHOLE})$", "", text)
    if re.search(r"[\u4e00-\u9fff]", text):
        text = _SUBJECT_ZH.sub("", text)
        # "at least use two" -> "use at least two", so that the quantity stays in one piece
        text = re.sub(rf"({_AMOUNT_ZH})(出现|使用|包含|加粗)", r"\2\1", text)
        text = re.sub(rf"^{_NOT_ZH}(?:{_VERB_ZH})?(?:任何)?", "不", text)
        text = re.sub(rf"^(?:{_VERB_ZH})", "", text)
    return Statement(text, literals)
