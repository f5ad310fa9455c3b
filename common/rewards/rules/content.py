"""Constraints on content and length: keywords, identifiers, punctuation; words, sentences, paragraphs.

A function here reads a statement in its plain wording (see `statements.read`) and returns a check of the answer, or
None if it does not understand the whole statement. Checks get a stripped answer that is not blank.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from common.rewards.rules import measures
from common.rewards.rules.statements import LITERAL, QUANTITY, Statement, bound

Check = Callable[[str], bool]

Q = f"(?P<q>{QUANTITY})"
_SEPARATOR = r"(?:, ?(?:and |or )?|、| and | or |和|与|及|以及|或)"
LIST = rf"{LITERAL}(?:{_SEPARATOR}{LITERAL})*"
_NAME = r"(?:(?:the )?(?:(?:key)?words?|terms?|phrases?) |关键词|词语|单词|短语|词)?"
_MARKS = {
    "period/full stop/句号": r"[.。．]",
    "comma/逗号": r"[,，]",
    "question mark/问号": r"[?？]",
    "exclamation mark/exclamation point/感叹号/叹号": r"[!！]",
    "semicolon/分号": r"[;；]",
    "colon/冒号": r"[:：]",
    "dash/dashe/em dash/em dashe/破折号": r"[—–]+",
    "hyphen/连字符": r"-",
    "ellipsis/ellipse/省略号": r"…+|\.{3,}",
    "quotation mark/引号": r"[\"“”「」]",
    "parenthesis/parenthese/括号": r"[()（）]",
    "apostrophe/撇号": r"['’]",
    "顿号": r"、",
}
_MARK_PATTERNS = {name: pattern for names, pattern in _MARKS.items() for name in names.split("/")}
_MARK = f"(?:{'|'.join(sorted(_MARK_PATTERNS, key=len, reverse=True))})"


def counted(quantity: str, count: Callable[[str], int]) -> Check:
    """The check that `count(answer)` is within the quantity."""
    allowed = bound(quantity)
    return lambda answer: allowed.allows(count(answer))


def _occurrences(keyword: str, answer: str) -> int:
    """Case is ignored. A word inside a longer word does not count, except beside Chinese, which has no word breaks."""
    before = r"(?<![A-Za-z0-9_])" if re.match(r"\w", keyword, re.A) else ""
    after = r"(?![A-Za-z0-9_])" if re.search(r"\w$", keyword, re.A) else ""
    return len(re.findall(before + re.escape(keyword) + after, answer, re.I))


def keywords(statement: Statement) -> Check | None:
    """Words that must, must not, or must this often appear."""
    words = statement.literals

    def present(answer: str) -> list[bool]:
        return [_occurrences(word, answer) > 0 for word in words]

    passive = r"(?:appear|be (?:used|included|mentioned|present))"
    if statement.match(rf"(?:not |不){_NAME}{LIST}(?:一词|这个词)?", rf"{_NAME}{LIST} not {passive}"):
        return lambda answer: not any(present(answer))
    if found := statement.match(rf"{Q} of {_NAME}{LIST}"):
        return counted(found["q"], lambda answer: sum(present(answer)))
    if found := statement.match(rf"{_NAME}{LITERAL} ?(?:(?:must |should )?{passive} |出现|使用)?{Q} ?(?:times?|次)"):
        return counted(found["q"], lambda answer: _occurrences(words[0], answer))
    if found := statement.match(rf"{_NAME}{LIST}(?: (?:must |should )?{passive})?"):
        any_will_do, all_are_needed = (re.search(word, found[0]) for word in (r" or |或", r" and |和|与|及"))
        if any_will_do and all_are_needed:  # of "a or b and c" it would have to be guessed what belongs together
            return None
        enough = any if any_will_do else all
        return lambda answer: enough(present(answer))
    return None


def _wrapped(answer: str, start: str, end: str) -> bool:
    """Both markers are there and do not share characters."""
    return answer.startswith(start) and answer.endswith(end) and len(answer) >= len(start) + len(end)


def _marked(line: str, start: str, end: str) -> bool:
    """Something stands between the first start marker and the last end marker."""
    return bool(line.partition(start)[2].rpartition(end)[0].strip())


def identifiers(statement: Statement) -> Check | None:
    """Exact strings at the start, at the end or around the title."""
    starts = rf"(?:(?:(?:starts?|begins?) with|start identifier) {LITERAL}|以{LITERAL}开头)"
    ends = rf"(?:(?:(?:ends?|finish(?:es)?) with|end identifier) {LITERAL}|以{LITERAL}(?:结尾|结束))"
    pair = rf"(?:in |with |between |用)?{LITERAL}(?: | and |, |和|、)?{LITERAL}"
    first, last = statement.literals[:1], statement.literals[-1:]
    whole = r"(?:the |your )?(?:whole |entire )?(?:answer|response|text)"
    if statement.match(
        rf"{starts}(?:,|并|且| and )+{ends}", rf"(?:wrap|enclose) {whole} {pair}", rf"{pair}包裹(?:全文|答案|回答)"
    ):
        return lambda answer: _wrapped(answer, first[0], last[0])
    if statement.match(starts):
        return lambda answer: answer.startswith(first[0])
    if statement.match(ends):
        return lambda answer: answer.endswith(last[0])
    if statement.match(rf"(?:wrap|enclose) (?:the |a |your )?title {pair}", rf"{pair}包裹标题"):
        return lambda answer: any(_marked(line, first[0], last[0]) for line in answer.splitlines())
    return None


def _mark_pattern(names: str) -> str:
    return "|".join(_MARK_PATTERNS[name] for name in re.findall(_MARK, names))


def punctuation(statement: Statement) -> Check | None:
    """Marks that must not appear, must appear this often, or must stand at the end; or none at all."""
    marks = rf"(?P<marks>{_MARK}s?(?:{_SEPARATOR}(?:any |an? )?{_MARK}s?)*)"
    if statement.match(r"not punctuation(?: marks?)?(?: at all| of any kind)?", "不标点(?:符号)?"):
        return lambda answer: not any(unicodedata.category(character)[0] == "P" for character in answer)
    if found := statement.match(rf"(?:not |不)(?:an? )?{marks}"):
        forbidden = re.compile(_mark_pattern(found["marks"]))
        return lambda answer: forbidden.search(answer) is None
    if found := statement.match(
        rf"(?P<no>not )?ends? with (?:an? )?{marks}",
        rf"(?:the )?ending punctuation (?:must |should )?(?P<no>not )?be (?:an? )?{marks}",
        rf"(?P<no>不)?以{marks}(?:结尾|结束)",
    ):
        ending, wanted = re.compile(f"(?:{_mark_pattern(found['marks'])})$"), found["no"] is None
        # emphasis around the last sentence is not its last character; the longest mark is "..."
        return lambda answer: (ending.search(answer.rstrip("*_ ")[-3:]) is not None) == wanted
    if found := statement.match(rf"{Q}(?: |个){marks}"):
        mark = re.compile(_mark_pattern(found["marks"]))
        return counted(found["q"], lambda answer: len(mark.findall(answer)))
    return None


def _length(statement: Statement, count: Callable[[str], int], english: str, chinese: str) -> Check | None:
    if found := statement.match(rf"{Q} {english}s?(?: long| in length| in total)?"):
        return counted(found["q"], count)
    if found := statement.match(rf"{Q}个?(?:{chinese})(?:之间)?(?P<suffix>以内|以上)?"):
        return counted(found["q"] + (found["suffix"] or ""), count)
    return None


def words(statement: Statement) -> Check | None:
    """How many words (a Chinese character is one)."""
    if found := statement.match(rf"字数{Q}(?:之间)?"):
        return counted(found["q"], measures.count_words)
    return _length(statement, measures.count_words, "word", "字|词")


def sentences(statement: Statement) -> Check | None:
    """How many sentences."""
    return _length(statement, measures.count_sentences, "sentence", "句话|句子|句")


def paragraphs(statement: Statement) -> Check | None:
    """How many paragraphs."""
    return _length(statement, measures.count_paragraphs, "paragraph", "段落|自然段|段")
