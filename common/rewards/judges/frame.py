"""The marks of a judge's prompt, and lines of a sample that read like them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_NO_LETTERS = re.compile(r"[\W_]+")
_SIGNS = re.compile(r"(?:[^\w\s]|_)+")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_SHAPES = {"Ps": "[", "Pe": "]"}
_BRACKETS = {sign: _SHAPES[kind] for sign in range(0x10000) if (kind := unicodedata.category(chr(sign))) in _SHAPES}
_BRACKETS |= str.maketrans({"<": "[", ">": "]"})
_BRACKETED = re.compile(r"\[.*\]")
# Accents too: nobody reads another word where a letter has one more. And letters that look like blanks.
_UNSEEN = ("Cf", "Mn", "Me")
_BLANK = "\u115f\u1160\u2800\u3164"


class Frame:
    """Marks, the texts right before and behind the fields of a prompt, whose copies in a sample are quoted.

    A line is taken for a copy when it reads like a mark, whatever its case, blanks and signs; when it begins with one
    that ends in a sign (`A:`); when it holds one in brackets with them, one of several words, or between signs one that
    is both. No rule finds every copy that a model may take for the mark: what is left, `safework attack` measures.
    """

    def __init__(self, marks: Iterable[str]) -> None:
        found = [mark for mark in map(_visible, marks) if _letters(mark).isalnum() or len(mark) > 2]
        bracketed = [mark for mark in found if _BRACKETED.fullmatch(_signs(mark))]
        phrases = [mark for mark in found if _has_several_words(mark)]
        self._alone = {_letters(mark) for mark in found}
        self._first = tuple(_signs(mark) for mark in found if not mark[-1].isalnum())
        self._brackets = [_signs(mark) for mark in bracketed]
        self._clauses = {_letters(mark) for mark in phrases}
        self._phrases = [mark for mark in phrases if mark not in bracketed]
        # Whatever makes a line a copy leaves a mark's letters in it, one behind the other.
        self._letters = {letters if letters.isalnum() else "" for letters in self._alone}

    def quoted(self, text: str) -> str:
        """The text with `> ` before each line that reads like a mark."""
        read = _letters(_visible(text))  # most texts are no copy anywhere, and this is read in one go
        if not any(letters in read for letters in self._letters):
            return text
        return "".join(
            f"> {line}" if self._is_copy(_visible(line)) else line for line in text.splitlines(keepends=True)
        )

    def _is_copy(self, line: str) -> bool:
        signs = _signs(line)
        return (
            _letters(line) in self._alone
            or signs.startswith(self._first)
            or any(mark in signs for mark in self._brackets)
            or any(_letters(clause) in self._clauses for clause in _SIGNS.split(line))
            or any(_holds(line, mark) for mark in self._phrases)
        )


def _visible(line: str) -> str:
    """What a person sees of a line, in one form of each letter."""
    if line.isascii():
        return line.casefold().strip()
    plain = unicodedata.normalize("NFKD", line).casefold()  # apart, or an accent would be part of its letter
    return "".join(sign for sign in plain if unicodedata.category(sign) not in _UNSEEN and sign not in _BLANK).strip()


def _letters(line: str) -> str:
    """What a person reads of a line; its signs where it has nothing else, such as a rule of dashes."""
    return _NO_LETTERS.sub("", line) or line


def _signs(line: str) -> str:
    """A line without blanks, its brackets of whatever shape made square."""
    return "".join(line.split()).translate(_BRACKETS)


def _has_several_words(mark: str) -> bool:
    """Chinese writes words without blanks; four characters are two of them."""
    return len(_words(mark).split()) > 1 or len(_CHINESE.findall(mark)) > 3


def _holds(line: str, mark: str) -> bool:
    """Whether a line holds the words of a mark, in Chinese among others without a border."""
    if _CHINESE.search(mark):
        return _letters(mark) in _letters(line)
    return _words(mark) in _words(line)


def _words(line: str) -> str:
    return f" {_NO_LETTERS.sub(' ', line).strip()} "
