"""What a person sees while servers start: a line a server, in place on a terminal, from time to time elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

_EVERY_S = 10.0


class Row(NamedTuple):
    """A server that is not ready: who, for how long, and the last that was heard of it."""

    title: str
    seconds: float
    state: str


class Board:
    """Lines about servers on a console. Use as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._shown_at = time.monotonic()

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, rows: Sequence[Row]) -> None:
        """How the servers are now; an empty list clears a terminal's lines."""
        if self._live is not None:
            self._live.update(Group(*map(_line, rows)), refresh=True)
        elif rows and time.monotonic() - self._shown_at >= _EVERY_S:
            self._shown_at = time.monotonic()
            for row in rows:
                self.say(f"{row.title}: {row.seconds:.0f} s, {row.state}")


def _line(row: Row) -> Text:
    return Text(f"{row.title}  {row.seconds:4.0f} s  {row.state}", no_wrap=True, overflow="ellipsis")
