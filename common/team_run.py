"""A run folder as a team uses it: one process writes the records, all write their parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

from common.disk import NotSaved
from common.interrupt import Interrupt
from common.journal import Journal
from common.run_dir import JOURNAL, LoopState, RunDir
from common.state_files import write_part
from common.team import Team
from common.types import TrainBatch, TrainingState


class TeamRun:
    """The run folder of every process of a team, on a disk that they share. Use as a context around the loop.

    A checkpoint is written beside the training that goes on, one at a time: the next one, the end of the run and an
    error wait for it, a second Ctrl-C does not. It is complete when the last process has written its part, and counts
    from then on; what ends the run before leaves the one before it.
    """

    def __init__(self, run_dir: RunDir, team: Team, interrupt: Interrupt, keep: int, deadline_s: float) -> None:
        self._run_dir, self._team, self._interrupt = run_dir, team, interrupt
        self._keep, self._deadline_s = keep, deadline_s
        self._pool = ThreadPool(1)  # of daemons: no process lives on for it
        self._saving: AsyncResult[None] | None = None
        self._journal = ""  # that of the step to go on with
        self._last: tuple[int, str] | None = None  # step and name of the newest save, complete or not

    def __enter__(self) -> TeamRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._wait()
            self._team.exchange(None, "the last checkpoint")
        elif issubclass(kind, NotSaved):
            self._wait()  # what it may raise is the reason: a checkpoint that fills the disk leaves none for records
        elif self._saving is not None and issubclass(kind, Exception):
            self._saving.wait()

    def resume(self) -> tuple[LoopState, Path]:
        """The state of the newest complete checkpoint, to which the records are cut back, and its folder."""
        state = self._run_dir.state()
        if self._team.leads:
            self._run_dir.rewind_records(state)
            self._journal = self._run_dir.read_journal() if state.step else ""
        [(state, self._journal), *_] = self._team.exchange((state, self._journal), "the state to go on from")
        self._last = (state.step, state.save) if state.step else None
        return state, self._run_dir.checkpoint(state.step)

    def stopping(self) -> bool:
        """Whether one of the processes has been asked to stop; then all do, after the same step.

        Raises NotSaved when a checkpoint could not be written meanwhile.
        """
        if self._saving is not None and self._saving.ready():
            self._wait()
        return any(self._team.exchange(self._interrupt.requested, "the next step"))

    def record(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Add lines to a record file. Raises NotSaved."""
        if self._team.leads:
            self._run_dir.append(name, records)

    def journal(self, state: LoopState, seed: int, sources: Callable[[], dict[str, str]]) -> Journal:
        """What is known of the step that begins with this state, and where more of it goes. sources: digests of the
        user's own files that make scores.
        """
        text, self._journal = self._journal, ""
        if self._last is None or self._last[0] != state.step:
            return Journal("", {}, {}, None)
        key = {"save": self._last[1], "seed": seed}
        own = {**key, "sources": sources()} if self._team.leads else None
        [scored, *_] = self._team.exchange(own, "what makes scores")
        journal = Journal(text, key, scored, self._note)
        if self._team.leads and not len(journal):
            self._run_dir.clear_journal()
        return journal

    def _note(self, line: dict[str, Any]) -> None:
        if self._team.leads:
            self._run_dir.append(JOURNAL, [line])

    def save(self, state: LoopState, snapshot: Callable[[], TrainingState]) -> None:
        """Begin a checkpoint: the loop's state, and what each process's engine has of the training state now.

        Raises NotSaved when it cannot be begun, or the one before could not be written; every earlier checkpoint then
        is as it was.
        """
        self._wait()
        if self._team.leads:
            state = self._run_dir.begin_checkpoint(state)
        [state, *_] = self._team.exchange(state, f"the new folder of step {state.step}")
        self._last = state.step, state.save
        self._saving = self._pool.apply_async(self._write, (state, snapshot()))

    def _write(self, state: LoopState, part: TrainingState) -> None:
        count = len(self._team.places)
        try:
            with self._run_dir.saving(state.step) as folder:
                write_part(part, folder, self._team.index, count, state.save)
            if self._team.leads:
                self._run_dir.complete_checkpoint(state, count, self._keep, self._deadline_s)
        except NotSaved:
            if self._team.leads:
                self._run_dir.drop_unfinished(state.step)
            raise

    def _wait(self) -> None:
        """Return when no checkpoint is being written. Raises NotSaved when one could not be."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.get()

    def keep_batch(self, batch: TrainBatch, step: int) -> Path:
        """Keep a batch that could not be trained on, as an .npz of its arrays; returns the file. Raises NotSaved."""
        if self._team.leads:
            self._run_dir.save_batch(batch, step)
        return self._run_dir.failed_batch(step)
