"""One server that was started here: its process group, its log file, and its end."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE_S = 30.0
_LEFT_BEHIND_S, _KILLED_S, _COLLECTED_S, _POLL_S = 5.0, 10.0, 1.0, 0.1
_TAIL_BYTES = 65536
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
_ERROR = re.compile("error|exception", re.IGNORECASE)
# What a terminal would obey instead of showing: colours, cursor movements, other control characters.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _end_with_parent() -> None:
    """In the child: SIGTERM when the process that started it has ended, however that ended."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ServerProcess:
    """A server in a process group of its own, so that signals for the terminal's group are not for it, and everything
    that it starts can be ended with it. On Linux it is sent SIGTERM when this process is killed. Its output goes to
    `log`, which begins with the command line.

    Raises OSError when it cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log, self._command = log, f"$ {shlex.join(command)}"
        with log.open("wb") as output:
            output.write(f"{self._command}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509  calls one C function and takes no lock
            )

    def end(self) -> str | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"

    def last_line(self) -> str:
        """The last that it has written."""
        lines = self._lines()
        return lines[-1] if lines and lines[-1] != self._command else "has written nothing yet"

    def last_words(self, count: int) -> list[str]:
        """The end of the log; when the last error is further up, because the engine went on to clean up, half of it
        ends there.
        """
        lines = self._lines()
        errors = [index for index, line in enumerate(lines) if _ERROR.search(line)]
        if not errors or errors[-1] >= len(lines) - count:
            return lines[-count:]
        half = count // 2
        return [*lines[max(errors[-1] + 1 - half, 0) : errors[-1] + 1], "…", *lines[-half:]]

    def _lines(self) -> list[str]:
        """The log's last part, without blank lines and a terminal's commands; of one that is gone, nothing."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _TAIL_BYTES, 0))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        lines = [_CONTROL.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text)]
        return [line for line in lines if line]

    async def stop(self, hurry: Callable[[], bool]) -> str:
        """End the group: SIGTERM, then SIGKILL for what is left after a grace period, or as soon as `hurry` says so.

        Returns how it went. The processes that it started get a moment more than the server itself.
        """
        self._signal(signal.SIGTERM)
        await _until(lambda: self.end() is not None, GRACE_S, hurry)
        await _until(lambda: not self._signal(0), _LEFT_BEHIND_S, hurry)
        forced = self.end() is None
        self._signal(signal.SIGKILL)
        await _until(lambda: self.end() is not None, _KILLED_S, lambda: False)
        # Where nobody collects orphans, as in a container without an init, the dead among them stay for good.
        await _until(lambda: not self._signal(0), _COLLECTED_S, lambda: False)
        if self.end() is None:
            return f"process {self._process.pid} does not end, not even by SIGKILL; its driver or disk may hang"
        return "did not stop by itself and was killed" if forced else "stopped"

    def _signal(self, number: int) -> bool:
        """Send a signal to the group (0: none); whether there is anyone left in it."""
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of processes that have ended
            return False
        return True


async def _until(condition: Callable[[], bool], limit_s: float, hurry: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and not hurry() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
