"""The run folder: resolved config, metrics, rollouts, checkpoints under one atomic marker, and where to resume.

    config.yaml       resolved, each value with its origin
    metrics.jsonl     one line a step           evaluation.jsonl  one line a held-out evaluation
    rollouts.jsonl    one line a response
    journal.jsonl     the rollouts and scores so far of the step after the newest checkpoint
    checkpoints/step-000010/                    complete exactly when it has this name
    export/           the trained model as a Hugging Face folder

A checkpoint is written under another name, each process its own part of it, flushed to disk and renamed; only then are
old ones removed. It remembers how long the record files were, so that a resumed run cuts off what a killed one wrote
after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from common.disk import NotSaved, not_locked, not_written, sync
from common.state_files import MANIFEST, Count, first_problem, note_file, read_manifest, seal
from common.types import TrainBatch

JOURNAL = "journal.jsonl"
RECORDS = ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl")
_LOOK_S = 0.02  # between looks for the parts of other processes
_STEP_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class LoopState:
    """All that the loop itself must remember: the next step, the data cursor, updates so far, record file lengths, the
    data files' digests by path, and which save it is from.
    """

    step: Count = 0
    cursor: Count = 0
    policy_version: Count = 0
    record_bytes: dict[str, Count] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    save: str = ""


class RunDir:
    """One run's folder. Creates it when it is not there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.yaml"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._claimed: int | None = None

    def claim(self) -> bool:
        """Keep every other process from training here until `close` or the end of this one, however it ends; False
        where another has done so.
        """
        # A file, because a lock on a folder does not reach other hosts.
        self._claimed = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            return False
        except OSError as error:  # a file system without locks
            self.close()
            raise not_locked(self.path, error) from error
        return True

    def close(self) -> None:
        """Give back what `claim` took."""
        if self._claimed is not None:
            os.close(self._claimed)
            self._claimed = None

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = [_STEP_NAME.fullmatch(folder.name) for folder in self.checkpoints.iterdir()]
        return sorted(int(match.group(1)) for match in names if match)

    def checkpoint(self, step: int) -> Path:
        """The folder of a complete checkpoint."""
        return self.checkpoints / f"step-{step:06d}"

    def unfinished(self, step: int) -> Path:
        """The folder of a checkpoint before it is complete, and when it goes."""
        return self.checkpoint(step).with_suffix(".partial")

    def state(self) -> LoopState:
        """The loop state of the newest complete checkpoint, or that of a run not yet begun. Raises NotSaved where its
        manifest cannot be read.
        """
        steps = self.saved_steps()
        if not steps:
            return LoopState()
        folder = self.checkpoint(steps[-1])
        found = read_manifest(folder).loop
        try:
            if {*found} == {entry.name for entry in fields(LoopState)}:
                return TypeAdapter(LoopState).validate_python(found)
            problem = f"its loop has {', '.join(map(repr, found)) or 'no entries'}"
        except ValidationError as error:
            problem = f"loop, {first_problem(error)}"
        raise NotSaved(
            f"{folder / MANIFEST}: is damaged, or of another version ({problem}). Put it back, or start anew in "
            "another run.dir."
        )

    def rewind_records(self, state: LoopState) -> None:
        """Cut the record files back to where the state left them and remove half-written checkpoints; where no
        checkpoint was complete, records get the ending `.old` instead, or `.old2` and so on.

        Raises NotSaved when one is shorter than that: somebody has changed it.
        """
        lengths = {self.path / name: state.record_bytes.get(name, 0) for name in RECORDS}
        for path, length in lengths.items():
            if _length(path) < length:
                raise NotSaved(
                    f"{path}: is shorter than the {length} bytes it had at the checkpoint of step {state.step}, so it "
                    "was changed or removed. Put it back, or start anew in another run.dir."
                )
        for path, length in lengths.items():
            if path.exists() and state.step == 0:
                # Somebody may have removed the checkpoints of a long run; its records must outlive that.
                path.rename(_free_name(path.with_name(path.name + ".old")))
            elif path.exists():
                os.truncate(path, length)
        if state.step == 0:
            self.clear_journal()
        for folder in self.checkpoints.glob("*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def write_config(self, text: str) -> None:
        """Write config.yaml; on a full disk the old one stays. Raises NotSaved."""
        partial = self.config.with_name(self.config.name + ".partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.rename(self.config)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._not_saved(self.config, error) from error

    def failed_batch(self, step: int) -> Path:
        """Where `save_batch` puts a step's batch."""
        return self.path / f"failed-batch-step-{step:06d}.npz"

    def save_batch(self, batch: TrainBatch, step: int) -> None:
        """Keep a batch that could not be trained on, as an .npz of its arrays. Raises NotSaved."""
        path = self.failed_batch(step)
        arrays = {name: array for name, array in vars(batch).items() if array is not None}
        try:
            np.savez_compressed(path, **arrays)
        except OSError as error:
            raise self._not_saved(path, error) from error

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Add lines to a record file. Raises NotSaved."""
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise self._not_saved(path, error) from error

    def read_journal(self) -> str:
        """The whole lines of the journal, to which it is cut back; what a killed process was writing is none. Raises
        NotSaved.
        """
        path = self.path / JOURNAL
        if not path.exists():
            return ""
        try:
            whole = path.read_bytes().rpartition(b"\n")[0]
            os.truncate(path, len(whole) + 1 if whole else 0)
        except OSError as error:
            raise self._not_saved(path, error) from error
        return whole.decode(errors="replace")

    def clear_journal(self) -> None:
        """Remove the journal: what it holds is of no use any more. Raises NotSaved."""
        path = self.path / JOURNAL
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._not_saved(path, error) from error

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """The folder of a checkpoint that is not complete yet, to write a part of it into. Raises NotSaved."""
        try:
            yield self.unfinished(step)
        except OSError as error:
            raise self._not_saved(self.checkpoint(step), error) from error

    def begin_checkpoint(self, state: LoopState) -> LoopState:
        """Make the folder for the parts of a checkpoint; returns what its manifest is to hold: the state, how long the
        record files are, and a name for this save that no other has. Raises NotSaved.
        """
        with self.saving(state.step) as partial:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            lengths = {name: _length(self.path / name) for name in RECORDS}
        return replace(state, record_bytes=lengths, save=secrets.token_hex(8))

    def complete_checkpoint(self, state: LoopState, count: int, keep: int, deadline_s: float) -> None:
        """Wait for the parts of `count` processes, put the checkpoint in its place, and remove all but `keep`.

        Raises NotSaved, with every earlier checkpoint as it was, when the disk refuses or a part does not come.
        """
        final, partial = self.checkpoint(state.step), self.unfinished(state.step)
        try:
            self._await_parts(partial, count, deadline_s)
            for name in RECORDS:
                if state.record_bytes[name]:
                    sync(self.path / name)
            seal(partial, count, asdict(state))
            sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self.checkpoints)
        except OSError as error:
            raise self._not_saved(final, error) from error
        for step in self.saved_steps()[:-keep]:
            # Renamed first: a folder that is half gone must not look complete. What stays is tried again next time.
            old = self.unfinished(step)
            shutil.rmtree(old, ignore_errors=True)
            with suppress(OSError):
                self.checkpoint(step).rename(old)
                shutil.rmtree(old, ignore_errors=True)

    def drop_unfinished(self, step: int) -> None:
        """Remove what there is of a checkpoint that will not be complete: it may be what fills the disk."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def _await_parts(self, partial: Path, count: int, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while missing := [index for index in range(count) if not note_file(partial, index, count).exists()]:
            if time.monotonic() > deadline:
                raise NotSaved(
                    f"{partial}: no part of process {', '.join(map(str, missing))} after {deadline_s:.0f} s "
                    "(run.deadline_s). Give it longer, and start the same command again."
                )
            time.sleep(_LOOK_S)

    def _not_saved(self, path: Path, error: OSError) -> NotSaved:
        steps = self.saved_steps()
        safe = f"the checkpoint of step {steps[-1]} is complete" if steps else "no checkpoint was complete yet"
        return not_written(path, error, "start the same command again", safe)


def _free_name(path: Path) -> Path:
    """The path, or with the first number behind it that nothing has yet."""
    names = (path.with_name(f"{path.name}{number}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
