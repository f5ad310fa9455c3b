"""Ctrl-C and SIGTERM as a request: what runs is finished and saved, a second one stops at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
INTERRUPTED = 130  # the exit status of what a signal stopped


class Interrupt:
    """While open, notes the first SIGINT or SIGTERM in `requested` and lets the second one through. `unit` is what the
    first one lets finish.
    """

    def __init__(self, unit: str) -> None:
        self.requested = False
        self._said = f"stopping after this {unit} (again: at once, losing it)\n".encode()

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice.
        with suppress(OSError):  # nobody may be reading any more
            os.write(STDERR, self._said)
