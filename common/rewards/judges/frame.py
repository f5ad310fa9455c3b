"""The marks of a judge's prompt, and lines of a sample that read like them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_NO_LETTERS = re.compile(r"[\W_]+")
_BRACKETS = str.maketrans({"<": "[", ">": "]"})
_BRACKETED = re.compile(r"\[.*\]")


class Frame:
    """Marks, the texts right before and behind the fields of a prompt, whose copies in a sample are quoted.

    A line is taken for a copy when it reads like a mark, whatever its case, blanks and signs; when it begins with one
    that ends in a sign (`A:`); and when it holds one in brackets or of several words. No rule finds every copy that a
    model may take for the mark: what is left, `safework attack` measures.
    """

    def __init__(self, marks: Iterable[str]) -> None:
        found = [mark for mark in marks if _letters(mark).isalnum() or len(mark) > 2]
        self._alone = {_letters(mark) for mark in found}
        self._first = tuple(_signs(mark) for mark in found if not mark[-1].isalnum())
        self._words = [_letters(mark) for mark in found if len(mark.split()) > 1]
        self._brackets = [_signs(mark) for mark in found if _BRACKETED.fullmatch(_signs(mark))]

    def quoted(self, text: str) -> str:
        """The text with `> ` before each line that reads like a mark."""
        if not self._alone:
            return text
        return "".join(f"> {line}" if self._is_copy(line) else line for line in text.splitlines(keepends=True))

    def _is_copy(self, line: str) -> bool:
        letters, signs = _letters(line), _signs(line)
        return (
            letters in self._alone
            or signs.startswith(self._first)
            or any(mark in letters for mark in self._words)
            or any(mark in signs for mark in self._brackets)
        )


def _letters(line: str) -> str:
    """What a person reads of a line; its signs where it has nothing else, such as a rule of dashes."""
    plain = unicodedata.normalize("NFKC", line).casefold()
    return _NO_LETTERS.sub("", plain) or plain.strip()


def _signs(line: str) -> str:
    """A line without what cannot be seen, its brackets of whatever shape made square."""
    plain = unicodedata.normalize("NFKC", line).casefold()
    kept = (_square(sign) for sign in plain if not sign.isspace() and unicodedata.category(sign) != "Cf")
    return "".join(kept).translate(_BRACKETS)


def _square(sign: str) -> str:
    return {"Ps": "[", "Pe": "]"}.get(unicodedata.category(sign), sign)
