"""A program on a Ray cluster as the driver sees it, and which of several that ended was the first to."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.launch.program import Spot

_ACTOR_S = 120.0

_BLAMES = re.compile(r"error: process \d+ of \d+ ")
_ERROR = re.compile(r"error: |(\w+\.)*\w*(Error|Exception)\b")


class LaunchFailed(RuntimeError):
    """A program of the job has ended and may not be started again; the message names it."""


class Member:
    """One actor and its program. `status` is its exit status, negative for a signal; None while it runs."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self.actor = name, actor
        self.starts = 0
        self.status: int | None = None
        self.lost = self.ready = False
        self._why, self._error, self._began_at = "", "", 0.0
        self._asked: Any = None

    @property
    def ended(self) -> bool:
        """Whether its program has ended, or is not to be reached any more."""
        return self.lost or self.status is not None

    def spot(self) -> Spot:
        """Where the actor is. Raises LaunchFailed when it does not come up."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            return ray.get(self.actor.spot.remote(), timeout=_ACTOR_S)
        except (GetTimeoutError, RayActorError) as error:
            raise LaunchFailed(f"{self.name}: Ray has not brought up its actor ({_first_line(error)}).") from error

    def replace(self, actor: Any) -> None:
        """Go on with another actor."""
        self.actor, self.lost = actor, False

    def start(self, command: Sequence[str], environment: Mapping[str, str], port: int = 0) -> None:
        """Start the program in the driver's folder, for the first time or again, once its port is free."""
        self.starts += 1
        self.status, self.ready, self._error = None, False, ""
        self._began_at = time.monotonic()
        self._asked = self.actor.start.remote(command, {"PYTHONUNBUFFERED": "1", **environment}, os.getcwd(), port)

    def hear(self, say: Callable[[str], None]) -> None:
        """Print what the program has printed, and note its end. Waits for nothing."""
        import ray
        from ray.exceptions import RayActorError

        if self.ended or not ray.wait([self._asked], timeout=0)[0]:
            return
        try:
            answer: Any = ray.get(self._asked)
        except RayActorError as error:
            self.lost, self._why = True, _first_line(error)
            return
        if isinstance(answer, str):
            if answer:
                self.lost, self._why = True, f"could not be started: {answer}"
                return
        else:
            for line in answer.lines:
                self._note(line)
                say(f"[{self.name}] {line}")
            self.status = answer.status
        if not self.ended:
            self._asked = self.actor.news.remote()

    def _note(self, line: str) -> None:
        if _ERROR.match(line):
            self._error = line
        self.ready = self.ready or line.startswith("ready: ")

    def signal(self, number: int) -> None:
        """Send a signal to the program, where it runs."""
        if not self.ended:
            self.actor.signal.remote(number)

    def let_go(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self.actor)

    @property
    def blames_another(self) -> bool:
        """Whether it ended because another process of the run has."""
        return _BLAMES.match(self._error) is not None

    def fault(self) -> str:
        """Who ended, how and when, as the beginning of a sentence."""
        after = f"after {time.monotonic() - self._began_at:.0f} s"
        if self.status is None:
            return f"{self.name}: lost {after} ({self._why or 'it did not end with the others and was killed'})"
        if self.status < 0:
            return f"{self.name}: killed by signal {-self.status} ({signal.strsignal(-self.status)}) {after}"
        said = f": {self._error}" if self._error else ""
        return f"{self.name}: ended {after} with exit status {self.status}{said}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def culprit(members: Sequence[Member]) -> Member:
    """The member whose end ended the others; any of them when none has failed."""
    failed = [member for member in members if member.ended and member.status != 0]
    return next((member for member in failed if not member.blames_another), [*failed, *members][0])
