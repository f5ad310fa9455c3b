"""A summary as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from common.scoring.summary import Agreement, Change, Spread, Summary

_MISSING = "-"


def tables(summary: Summary) -> Iterator[Table]:
    """Scores first, then agreement with its tables of verdicts, then changes; each only where there is something."""
    yield _table("scores", Spread, summary.spreads)
    if summary.agreements:
        yield _table("agreement with what the records expect", Agreement, summary.agreements)
        yield from (_confusion(each) for each in summary.agreements if each.confusion)
    if summary.changes:
        yield _table("changes since the run", Change, summary.changes)


def _table(title: str, kind: type, rows: Sequence[Any]) -> Table:
    """A column a field; tables within a field stand elsewhere."""
    table = Table(title=title, title_justify="left")
    names = [name for name in kind.__dataclass_fields__ if name != "confusion"]
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name in ("label", "verifier") else "right")
    for row in rows:
        table.add_row(*(_cell(vars(row)[name]) for name in names))
    return table


def _confusion(agreement: Agreement) -> Table:
    table = Table(title=escape(f"{agreement.label}, {agreement.verifier}"), title_justify="left")
    table.add_column("expected, judged:")
    judged = {verdict for row in agreement.confusion.values() for verdict, count in row.items() if count}
    columns = [verdict for verdict in next(iter(agreement.confusion.values())) if verdict in judged]
    for verdict in columns:
        table.add_column(escape(verdict), justify="right")
    for verdict, row in agreement.confusion.items():
        table.add_row(escape(verdict), *(str(row[column]) for column in columns))
    return table


def _cell(value: str | float | None) -> str:
    if value is None:
        return _MISSING
    return escape(value) if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)
