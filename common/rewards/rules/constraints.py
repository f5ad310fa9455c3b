"""The twelve kinds of constraint by name, and the way from a reference to checks.

A reference is a list of `[family, sub_type, statement]`, for example `[["Length", "Words", "at most 12 words"]]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from common.rewards.rules import content, formats
from common.rewards.rules.content import Check
from common.rewards.rules.statements import Statement, read


class Kind(NamedTuple):
    """A sub-type: its family, the function that reads its statements, and statements that it understands."""

    family: str
    parse: Callable[[Statement], Check | None]
    example: str


class Constraint(NamedTuple):
    """The statement a person reads and the check that decides it; the check gets a stripped, non-blank answer."""

    statement: str
    check: Check


KINDS = {
    "keywords": Kind("content", content.keywords, "must include the keyword 'apple'"),
    "identifiers": Kind("content", content.identifiers, "start with 'Answer:'"),
    "punctuation": Kind("content", content.punctuation, "do not use commas"),
    "words": Kind("length", content.words, "between 5 and 10 words"),
    "sentences": Kind("length", content.sentences, "at least 3 sentences"),
    "paragraphs": Kind("length", content.paragraphs, "exactly 2 paragraphs"),
    "json": Kind("format", formats.json_text, "a JSON object with the keys 'name' and 'age'"),
    "markdown": Kind("format", formats.markdown, "a bullet list with exactly 3 items"),
    "table": Kind("format", formats.table, "a table with 3 columns and at most 5 rows"),
    "xml": Kind("format", formats.xml, "be wrapped in <answer> tags"),
    "english": Kind("language", formats.english, "all lowercase"),
    "chinese": Kind("language", formats.chinese, "in Simplified Chinese"),
}


def _kind(family: str, sub_type: str) -> Kind:
    """Published data also writes `["Table", "Row limit", ...]` and `["Content", "Keywords: Must include", ...]`."""
    family, sub_type = family.strip().lower(), sub_type.partition(":")[0].strip().lower()
    kind = KINDS.get(family) or KINDS.get(sub_type)
    if kind is None or family not in (kind.family, *KINDS):
        known = ", ".join(f"{kind.family}/{name}" for name, kind in KINDS.items())
        raise ValueError(f'Unknown constraint kind "{family}/{sub_type}"; known are {known}.')
    return kind


def parse_constraint(triple: Any) -> Constraint:
    """One `[family, sub_type, statement]`. Raises ValueError where it is no such triple or is not understood."""
    if not (isinstance(triple, list | tuple) and len(triple) == 3 and all(isinstance(part, str) for part in triple)):
        raise ValueError(f"A constraint is [family, sub_type, statement], three strings; got {triple!r}.")
    family, sub_type, statement = triple
    kind = _kind(family, sub_type)
    check = kind.parse(read(statement))
    if check is None:
        raise ValueError(
            f'{family}/{sub_type}: the statement "{statement}" is not understood; '
            f'an example of what is: "{kind.example}".'
        )
    return Constraint(statement, check)


def parse_reference(reference: Any) -> list[Constraint]:
    """All constraints of a reference, in order. A list of one constraint stays a list; a bare triple is an error."""
    if not isinstance(reference, list | tuple) or not reference or any(isinstance(item, str) for item in reference):
        raise ValueError(
            f"The reference must be a list of [family, sub_type, statement], also for one constraint; got "
            f"{reference!r}."
        )
    return [parse_constraint(triple) for triple in reference]
