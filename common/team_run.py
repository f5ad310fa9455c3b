"""A run folder as a team uses it: one process writes the records, all write their parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.interrupt import Interrupt
from common.run_dir import LoopState, RunDir
from common.team import Team
from common.types import TrainBatch


class TeamRun:
    """The run folder of every process of a team, on a disk that they share."""

    def __init__(self, run_dir: RunDir, team: Team, interrupt: Interrupt, keep: int) -> None:
        self._run_dir, self._team, self._interrupt, self._keep = run_dir, team, interrupt, keep

    def resume(self) -> tuple[LoopState, Path]:
        """The state of the newest complete checkpoint, to which the records are cut back, and its folder."""
        state = self._run_dir.state()
        if self._team.leads:
            self._run_dir.rewind_records(state)
        [state, *_] = self._team.exchange(state, "the state to go on from")
        return state, self._run_dir.checkpoint(state.step)

    def stopping(self) -> bool:
        """Whether one of the processes has been asked to stop; then all do, after the same step."""
        return any(self._team.exchange(self._interrupt.requested, "the next step"))

    def record(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Add lines to a record file. Raises NotSaved."""
        if self._team.leads:
            self._run_dir.append(name, records)

    def save(self, state: LoopState, write_engine: Callable[[Path], None]) -> None:
        """A complete checkpoint: the loop's state, and the parts that the engine of each process writes.

        Raises NotSaved and leaves every earlier checkpoint as it was.
        """

        def write_together(folder: Path) -> None:
            self._team.exchange(None, f"the new folder {folder}")
            write_engine(folder)
            self._team.exchange(None, f"all parts of {folder}")

        if self._team.leads:
            self._run_dir.save(state, write_together, self._keep)
        else:
            with self._run_dir.saving(state.step) as folder:
                write_together(folder)
        self._team.exchange(None, f"the checkpoint of step {state.step}")

    def keep_batch(self, batch: TrainBatch, step: int) -> Path:
        """Keep a batch that could not be trained on, as an .npz of its arrays; returns the file. Raises NotSaved."""
        if self._team.leads:
            self._run_dir.save_batch(batch, step)
        return self._run_dir.failed_batch(step)
