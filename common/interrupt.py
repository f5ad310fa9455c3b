"""Ctrl-C and SIGTERM as a request: what runs is finished and saved, and a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
INTERRUPTED = 130  # the exit status of what a signal stopped, in this process or in another one of its run


def stop_at_sigterm() -> None:
    """From here on SIGTERM is what Ctrl-C is, while no Interrupt is open: KeyboardInterrupt, and not a sudden end."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # launcher and scheduler may both send it, and one is enough
    raise KeyboardInterrupt


class Interrupt:
    """While open, notes the first SIGINT or SIGTERM in `requested` and lets a further SIGINT through. `unit` is what
    the first one lets finish. A further SIGTERM changes nothing: launchers and schedulers each send theirs, and the one
    that will wait no longer sends SIGKILL.
    """

    def __init__(self, unit: str) -> None:
        self.requested = False
        self._said = f"stopping after this {unit} (Ctrl-C: at once, losing it)\n".encode()

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        # Not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice.
        with suppress(OSError):  # nobody may be reading any more
            os.write(STDERR, self._said)
