"""How words, sentences, paragraphs, lists, tables and languages of a text are counted."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import NamedTuple

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_LATIN = "A-Za-zÀ-ÖØ-öø-ɏ"
_WORD = re.compile(rf"[{HAN}]|\d+(?:[.,]\d+)+|[^\W{HAN}_]+(?:['’-][^\W{HAN}_]+)*")
_ABBREVIATION = re.compile(r"\b(?:[A-Za-z]\.)+[A-Za-z]\.|\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|No|Fig|cf|approx)\.", re.I)
_LIST_MARK = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)、])[ \t]*", re.M)
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*(?=\s|$)|[。！？]+[”’」』）*_]*|\n+")
_RULER = re.compile(r"\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?")
# Formulas are bounded: an unbounded search for a closing mark that never comes is quadratic in the response.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|$)|`[^`\n]{1,500}`|https?://[!-~]+"
    r"|\$\$.{1,1000}?\$\$|\$[^$\n]{1,500}\$|\\\[.{1,1000}?\\\]|\\\(.{1,1000}?\\\)|\\[A-Za-z]+",
    re.S,
)


class Table(NamedTuple):
    """Size of one markdown table; the header is not a row."""

    columns: int
    rows: int


def count_words(text: str) -> int:
    """Every Chinese character is a word; elsewhere a run of letters or digits is ("don't", "well-known", "3.14")."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Pieces that hold a word, ended by . ! ? … (before a space), by 。！？, or by a line break.

    Decimals, common abbreviations and list numbers end no sentence; a heading or list item is one.
    """
    text = _LIST_MARK.sub("", _ABBREVIATION.sub("abbreviation", text))
    return sum(count_words(piece) > 0 for piece in _SENTENCE_END.split(text))


def count_paragraphs(text: str) -> int:
    """Blocks between blank lines that hold a word; a block that is only a heading is not a paragraph."""
    blocks = re.split(r"\n[ \t]*\n", text.strip())
    return sum(count_words(block) > 0 and not re.fullmatch(r"#{1,6} .*", block.strip()) for block in blocks)


def unfence(text: str) -> str:
    """The text without one code fence around all of it."""
    fenced = re.fullmatch(r"```[\w+-]*[ \t]*\n(.*?)\n?```", text.strip(), re.S)
    return fenced[1].strip() if fenced and "```" not in fenced[1] else text.strip()


def lines(text: str) -> list[str]:
    """The lines that markdown reads as markdown: those outside code blocks."""
    return re.sub(r"^```.*?(?:^```|\Z)", "", unfence(text), flags=re.S | re.M).splitlines()


def headings(text: str) -> list[int]:
    """The level of each markdown heading."""
    return [len(line) - len(line.lstrip("#")) for line in lines(text) if re.match(r"#{1,6} +\S", line)]


def count_items(text: str, mark: str) -> int:
    """List items at any depth whose mark fits the pattern `mark` and that have a text."""
    return sum(bool(re.match(rf"\s*{mark}\s*\S", line)) for line in lines(text))


def _cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))) + 1


def tables(text: str) -> list[Table]:
    """Every markdown table: a header line, a ruler of as many cells, and the lines with a bar after it."""
    found = []
    rest = iter(lines(text))
    header = ""
    for line in rest:
        ruler = line.strip()
        if "|" in header and "|" in ruler and _RULER.fullmatch(ruler) and _cells(header) == _cells(ruler):
            body = takewhile(lambda row: "|" in row, rest)
            found.append(Table(_cells(header), sum(1 for _ in body)))
        header = line
    return found


def language(text: str, share: float = 0.7) -> str | None:
    """The script that holds at least `share` of a text: "Chinese", "English" (any Latin script), "other"; else "mixed".

    Counted are Chinese characters, Latin words and words of other scripts (each kana or hangul character), so that
    a few long terms do not outweigh a sentence. Code, formulas and web addresses do not count. None: no letters.
    """
    text = _NOT_PROSE.sub(" ", text)
    counts = {
        "Chinese": len(re.findall(rf"[{HAN}]", text)),
        "English": len(re.findall(rf"[{_LATIN}]+", text)),
        "other": len(
            re.findall(rf"[\u3040-\u30ff\uac00-\ud7af]|[^\W\d_{HAN}{_LATIN}\u3040-\u30ff\uac00-\ud7af]+", text)
        ),
    }
    total = sum(counts.values())
    if not total:
        return None
    return next((name for name, count in counts.items() if count >= share * total), "mixed")


def _foreign_share(text: str, own: str, other: str) -> float:
    """Share of the Chinese characters that the character set `other` has and `own` has not."""

    def knows(encoding: str, character: str) -> bool:
        return bool(character.encode(encoding, errors="ignore"))

    characters = re.findall(rf"[{HAN}]", text)
    return sum(knows(other, one) and not knows(own, one) for one in characters) / max(len(characters), 1)


def is_simplified(text: str) -> bool:
    """At most 2 % of the Chinese characters are in Big5 but not in GB 2312 (a rare name is not another script)."""
    return _foreign_share(text, own="gb2312", other="big5") <= 0.02


def is_traditional(text: str) -> bool:
    """At most 2 % of the Chinese characters are in GB 2312 but not in Big5."""
    return _foreign_share(text, own="big5", other="gb2312") <= 0.02
