"""Verifiers side by side, each in a thread of its own, because most of them wait for a server or a worker process."""

from __future__ import annotations

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
        self._pool = ThreadPool(max(len(verifiers), 1))  # its threads are daemons
        self._late: dict[str, AsyncResult[list[Score | Missing]]] = {}

    def results(self, work: Mapping[str, Sequence[Sample]]) -> dict[str, list[Score | Missing]]:
        """Each verifier's results for its samples, in order. Raises what a verifier raises."""
        deadline = time.monotonic() + self._deadline_s
        begun = {
            name: self._pool.apply_async(self._verifiers[name].score, (samples,))
            for name, samples in work.items()
            if samples and not self._still_late(name)
        }
        return {name: self._result(name, samples, begun.get(name), deadline) for name, samples in work.items()}

    def _still_late(self, name: str) -> bool:
        return name in self._late and not self._late[name].ready()

    def _result(
        self,
        name: str,
        samples: Sequence[Sample],
        begun: AsyncResult[list[Score | Missing]] | None,
        deadline: float,
    ) -> list[Score | Missing]:
        if begun is None:
            return [Missing("it still works on samples of an earlier step") for _ in samples]
        try:
            return begun.get(max(deadline - time.monotonic(), 0.0))
        except NoResult:
            self._late[name] = begun
            reason = f"it gave no result within {self._deadline_s:g} s (rewards.deadline_s)"
            return [Missing(reason) for _ in samples]
