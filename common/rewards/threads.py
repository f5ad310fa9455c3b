"""Verifiers side by side, each in a thread of its own, because most of them wait for a server or a worker process."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import TimeoutError as NoResult
from multiprocessing.pool import AsyncResult, ThreadPool

from common.rewards.verifier import Verifier
from common.types import Missing, Sample, Score


class Verifying:
    """Runs verifiers. One that has given no result within `deadline_s` leaves all its scores missing, and is not asked
    again as long as it is still at it; it holds up neither the others nor the end of the process.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], deadline_s: float) -> None:
        self._verifiers, self._deadline_s = verifiers, deadline_s
        self._busy = {name: threading.Lock() for name in verifiers}

    def results(self, work: Mapping[str, Sequence[Sample]]) -> dict[str, list[Score | Missing]]:
        """Each verifier's results for its samples, in order. Raises what a verifier raises."""
        asked = {name: samples for name, samples in work.items() if samples}
        found: dict[str, list[Score | Missing]] = {name: [] for name in work}
        if not asked:
            return found
        deadline = time.monotonic() + self._deadline_s
        with ThreadPool(len(asked)) as pool:  # its threads are daemons, and leaving the block waits for none
            begun = {name: pool.apply_async(self._score, (name, samples)) for name, samples in asked.items()}
            for name, samples in asked.items():
                found[name] = self._result(begun[name], samples, deadline)
        return found

    def _score(self, name: str, samples: Sequence[Sample]) -> list[Score | Missing]:
        if not self._busy[name].acquire(blocking=False):
            return [Missing("it still works on samples of an earlier step") for _ in samples]
        try:
            return self._verifiers[name].score(samples)
        finally:
            self._busy[name].release()

    def _result(
        self, begun: AsyncResult[list[Score | Missing]], samples: Sequence[Sample], deadline: float
    ) -> list[Score | Missing]:
        try:
            return begun.get(min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
        except NoResult:
            reason = f"it gave no result within {self._deadline_s:g} s (rewards.deadline_s)"
            return [Missing(reason) for _ in samples]
