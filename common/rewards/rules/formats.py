"""Constraints on format and language: JSON, markdown, tables, XML; English with its letter case, Chinese.

The functions are of the same form as those in `content`.
"""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

from common.rewards.rules import measures
from common.rewards.rules.content import LIST, Check, Q, counted
from common.rewards.rules.statements import LITERAL, QUANTITY, Statement, bound

_BOLD = re.compile(r"(?<!\*)\*\*(?![\s*])[^*\n]+?(?<!\s)\*\*(?!\*)|(?<!\w)__(?![\s_])[^_\n]+?(?<!\s)__(?!\w)")
_WRITINGS: dict[str, Check] = {
    "simplified": measures.is_simplified,
    "简体": measures.is_simplified,
    "traditional": measures.is_traditional,
    "繁体": measures.is_traditional,
}
_A = r"(?:an? |一个|个)?"


def _load(answer: str) -> Any:
    """The JSON value that the answer is, a code fence around it aside; None where it is none (or `null`)."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(measures.unfence(answer), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _depth(value: Any) -> int:
    """How many objects lie inside each other at the deepest place."""
    deepest, pending = 0, [(value, 0)]
    while pending:
        value, depth = pending.pop()
        depth += isinstance(value, dict)
        deepest = max(deepest, depth)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(item, depth) for item in inner]
    return deepest


_VALID = rf"{_A}(?:valid |well-formed |有效的|合法的|格式正确的)?"


def _json_object(statement: Statement) -> Check | None:
    keys = set(statement.literals)
    if statement.match(rf"{_VALID}json ?(?:object|对象)"):
        return lambda answer: isinstance(_load(answer), dict)
    if found := statement.match(
        rf"{_VALID}json object with (?P<only>exactly |only )?(?:the )?keys? {LIST}",
        rf"{_VALID}(?P<only>只)?(?:包含)?键{LIST}的json对象",
    ):
        fits = set.__eq__ if found["only"] else set.issuperset
        return lambda answer: isinstance(value := _load(answer), dict) and fits(set(value), keys)
    if found := statement.match(rf"(?:json )?object nesting levels? {Q}", rf"{Q} (?:json )?object nesting levels?"):
        deep = bound(found["q"])
        return lambda answer: isinstance(value := _load(answer), dict | list) and deep.allows(_depth(value))
    return None


def _json_array(statement: Statement) -> Check | None:
    if statement.match(rf"{_VALID}json ?(?:array|数组)"):
        return lambda answer: isinstance(_load(answer), list)
    if found := statement.match(
        rf"{_VALID}json array (?:of|with) {Q} (?:items?|elements?)", rf"{_VALID}(?:包含)?{Q}个?(?:元素|项)的json数组"
    ):
        length = bound(found["q"])
        return lambda answer: isinstance(value := _load(answer), list) and length.allows(len(value))
    return None


def json_text(statement: Statement) -> Check | None:
    """The whole answer is JSON: an object with these keys, objects nested this deep, an array of this length."""
    if statement.match(rf"{_VALID}json(?: format)?", rf"{_VALID}json格式"):
        return lambda answer: isinstance(_load(answer), dict | list)
    return _json_object(statement) or _json_array(statement)


def _lists(statement: Statement) -> Check | None:
    kinds = (("bullet(?:ed)?|unordered", "无序", r"[-*+•] "), ("numbered|ordered", "有序", r"\d+[.)、]"))
    for names, name_zh, mark in kinds:
        if found := statement.match(
            rf"{_A}(?:markdown )?(?:{names}) list (?:with|of) {Q} (?:items?|points?|entries)",
            rf"{Q} (?:{names}) (?:list )?(?:items?|points?)",
            rf"{_A}{Q}[个项]?的{name_zh}列表",
        ):
            return counted(found["q"], lambda answer, mark=mark: measures.count_items(answer, mark))
        if statement.match(rf"{_A}(?:markdown )?(?:{names}) list", f"{_A}{name_zh}列表"):
            return lambda answer, mark=mark: measures.count_items(answer, mark) > 0
    return None


def _headings(statement: Statement) -> Check | None:
    level = rf"(?P<level>{QUANTITY})"
    if found := statement.match(
        rf"{_A}level[ -]{level} heading", rf"{_A}heading of level {level}", rf"{_A}{level}级标题"
    ):
        wanted = bound(found["level"])
        return lambda answer: any(map(wanted.allows, measures.headings(answer)))
    if found := statement.match(rf"{Q} level[ -]{level} headings?", rf"{Q}个{level}级标题"):
        wanted = bound(found["level"])
        return counted(found["q"], lambda answer: sum(map(wanted.allows, measures.headings(answer))))
    if found := statement.match(rf"{Q} (?:different )?heading levels?", rf"{Q}级不同的标题"):
        return counted(found["q"], lambda answer: len(set(measures.headings(answer))))
    if found := statement.match(rf"{Q} (?:markdown )?headings?", rf"{Q}个标题"):
        return counted(found["q"], lambda answer: len(measures.headings(answer)))
    return None


def _spans(statement: Statement) -> Check | None:
    part = r"(?:words?|phrases?|parts?|terms?|sections?)"
    if found := statement.match(rf"bold {Q} {part}", rf"{Q} bold(?:ed)? {part}", rf"加粗{Q}[处个]?", rf"{Q}处加粗"):
        return counted(found["q"], lambda answer: len(_BOLD.findall("\n".join(measures.lines(answer)))))
    if statement.match(r"bold text|bold|加粗"):
        return lambda answer: _BOLD.search("\n".join(measures.lines(answer))) is not None
    if statement.match(rf"{_A}(?:block ?quotes?|引用块|引用)"):
        return lambda answer: any(re.match(r">\s*\S", line) for line in measures.lines(answer))
    if statement.match(rf"{_A}(?:code block|代码块)"):
        return lambda answer: any(code.strip() for code in re.findall(r"^```[^\n]*\n(.*?)^```", answer, re.S | re.M))
    return None


def markdown(statement: Statement) -> Check | None:
    """Lists, headings, bold parts, quotes and code blocks."""
    plain = Statement(re.sub(r" in markdown(?: format)?$", "", statement.wording), statement.literals)
    return _lists(plain) or _headings(plain) or _spans(plain)


def table(statement: Statement) -> Check | None:
    """A markdown table, and how many columns and rows each table of the answer has."""
    rows, columns = rf"(?P<rows>{QUANTITY})", rf"(?P<columns>{QUANTITY})"
    size = rf"(?:{columns} columns?)?(?: and )?(?:{rows} rows?)?"
    then = r"(?:it |they )?(?:must |should )?(?:have |contain )?"
    found = statement.match(
        rf"{_A}(?:markdown )?table(?: with {size})?",
        rf"{_A}(?:{columns}列)?(?:{rows}行)?的?(?:markdown)?表格",
        rf"(?P<if>if )(?:an? |any |the )?tables? (?:is|are) (?:used|included|present), {then}{size}",
    )
    if not found:
        return None
    limits = {side: bound(found[side]) for side in ("columns", "rows") if found[side]}
    optional = bool(found.groupdict().get("if"))
    if (optional or " with" in found[0]) and not limits:
        return None

    def check(answer: str) -> bool:
        sizes = [size._asdict() for size in measures.tables(answer)]
        fits = all(limit.allows(size[side]) for size in sizes for side, limit in limits.items())
        return fits and (optional or bool(sizes))

    return check


def _parse_xml(answer: str) -> ElementTree.Element | None:
    text = measures.unfence(answer)
    # a document type can define entities that expand without end
    if "<!DOCTYPE" in text:
        return None
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, UnicodeEncodeError):
        return None


def _enclosed(answer: str, tag: str) -> bool:
    text, start, end = measures.unfence(answer), f"<{tag}>", f"</{tag}>"
    return text.startswith(start) and text.endswith(end) and text.count(start) == text.count(end) == 1


def _holds_element(answer: str, tag: str) -> bool:
    opening = re.search(rf"<{re.escape(tag)}(?:\s[^<>]*)?>", answer)
    return opening is not None and f"</{tag}>" in answer[opening.end() :]


def xml(statement: Statement) -> Check | None:
    """Well-formed XML, its root and attributes, or plain tags around or within the answer."""
    tags = [literal.strip("</>") for literal in statement.literals]
    if statement.match(
        rf"(?:be )?(?:wrapped|enclosed) in {LITERAL}(?: xml)?(?: tags?)?", rf"用?{LITERAL}标签包裹(?:全文|答案|回答)?"
    ):
        return lambda answer: _enclosed(answer, tags[0])
    if statement.match(rf"{_VALID}xml(?: document| format)?", rf"{_VALID}xml格式"):
        return lambda answer: _parse_xml(answer) is not None
    if statement.match(rf"{_VALID}xml with (?:the |an? )?root(?: element| tag)? {LITERAL}"):
        return lambda answer: (root := _parse_xml(answer)) is not None and root.tag == tags[0]
    if statement.match(rf"(?:the )?(?:xml )?tags? {LIST}", rf"标签{LIST}"):
        return lambda answer: all(_holds_element(answer, tag) for tag in tags)
    if found := statement.match(rf"each (?:xml )?(?:element|tag) (?:must |should )?(?:have |contain )?{Q} attributes?"):
        allowed = bound(found["q"])
        return lambda answer: (
            (root := _parse_xml(answer)) is not None
            and all(allowed.allows(len(element.attrib)) for element in root.iter())
        )
    return None


def _capitalized(answer: str) -> bool:
    words = re.findall(r"(?<![\w'’-])[^\W\d_][\w'’-]*", answer)
    return any(word[0].isupper() for word in words) and not any(word[0].islower() for word in words)


def english(statement: Statement) -> Check | None:
    """Latin script, or its letter case. A case is met only where there are letters that have one."""
    case = r"(?:in )?(?:all |only )?(?:the )?"
    if statement.match("english", "英文|英语"):
        return lambda answer: measures.language(answer) == "English"
    if statement.match(rf"{case}(?:lower ?case|lowercase)(?: letters)?(?: only)?", "(?:全部)?小写(?:字母)?"):
        return str.islower
    if statement.match(rf"{case}(?:upper ?case|capital)(?: letters)?(?: only)?", "(?:全部)?大写(?:字母)?"):
        return str.isupper
    if statement.match(
        r"(?:in )?title case",
        r"(?:capitalized letters for|capitali[sz]e) (?:each|every) word",
        r"(?:each|every) word(?: in the (?:answer|response|text))? (?:must |should )?be capitali[sz]ed",
        "(?:每个)?单词首字母(?:都)?大写",
    ):
        return _capitalized
    return None


def chinese(statement: Statement) -> Check | None:
    """Chinese, simplified or traditional."""
    found = statement.match(
        r"(?P<kind>simplified |traditional )?chinese(?: characters)?",
        r"(?P<kind>simplified|traditional)",
        r"(?P<kind>简体|繁体)?(?:中文|汉语)",
    )
    if not found:
        return None
    writing = _WRITINGS.get((found["kind"] or "").strip())
    return lambda answer: measures.language(answer) == "Chinese" and (writing is None or writing(answer))
