"""The run folder: resolved config, metrics, rollouts, checkpoints under one atomic marker, and where to resume.

    config.yaml       resolved, each value with its origin
    metrics.jsonl     one line a step           evaluation.jsonl  one line a held-out evaluation
    rollouts.jsonl    one line a response
    checkpoints/step-000010/                    complete exactly when it has this name
    export/           the trained model as a Hugging Face folder

A checkpoint is written under another name, flushed to disk and renamed; only then are old ones removed. It remembers
how long the record files were, so that a resumed run cuts off what a killed one wrote after it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from common.types import TrainBatch

RECORDS = ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl")
STATE_FILE = "loop.json"
_STEP_NAME = re.compile(r"step-(\d{6,})")


class NotSaved(RuntimeError):
    """A file of the run folder is not what it should be, mostly because the disk refused a write; the message says
    which one, what is safe, and what to do.
    """


def not_written(path: Path | str, error: OSError, then: str, safe: str = "") -> NotSaved:
    """What to raise when the disk refused a write; `then`: what to do once that is mended, `safe`: what is not lost."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Make room on the disk" if is_full else "Mend that"
    kept = f"; {safe}" if safe else ""
    return NotSaved(f"{path}: could not be written ({error.strerror or error}){kept}. {remedy} and {then}.")


def not_locked(path: Path, error: OSError) -> NotSaved:
    """What to raise where a file system has no locks."""
    return NotSaved(
        f"{path}: cannot be kept to one process ({error.strerror or error}). Choose a path on another disk."
    )


@dataclass(frozen=True)
class LoopState:
    """All that the loop itself must remember: the next step, the data cursor, updates so far, record file lengths, and
    the data files' digests by path.
    """

    step: int = 0
    cursor: int = 0
    policy_version: int = 0
    record_bytes: dict[str, int] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


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
        """The loop state of the newest complete checkpoint, or that of a run not yet begun."""
        steps = self.saved_steps()
        if not steps:
            return LoopState()
        return LoopState(**json.loads((self.checkpoint(steps[-1]) / STATE_FILE).read_text()))

    def rewind_records(self, state: LoopState) -> None:
        """Cut the record files back to where the state left them and remove half-written checkpoints; where no
        checkpoint was complete, records get the ending `.old` instead, or `.old2` and so on.

        Raises NotSaved when one is shorter than that: somebody has changed it.
        """
        lengths = {self.path / name: state.record_bytes.get(name, 0) for name in RECORDS}
        for path, length in lengths.items():
            if (path.stat().st_size if path.exists() else 0) < length:
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

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """The folder that another process makes for a checkpoint, to write into. Raises NotSaved."""
        try:
            yield self.unfinished(step)
        except OSError as error:
            raise self._not_saved(self.checkpoint(step), error) from error

    def save(self, state: LoopState, write_engine: Callable[[Path], None], keep: int) -> None:
        """Write a complete checkpoint of the loop state and whatever `write_engine` puts into the folder it is given.

        Raises NotSaved and leaves every earlier checkpoint as it was.
        """
        final, partial = self.checkpoint(state.step), self.unfinished(state.step)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_engine(partial)
            lengths = {name: _synced_length(self.path / name) for name in RECORDS}
            (partial / STATE_FILE).write_text(json.dumps(asdict(state) | {"record_bytes": lengths}))
            flush_to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self.checkpoints)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._not_saved(final, error) from error
        for step in self.saved_steps()[:-keep]:
            # Renamed first: a folder that is half gone must not look complete.
            old = self.checkpoint(step).rename(self.unfinished(step))
            shutil.rmtree(old, ignore_errors=True)

    def _not_saved(self, path: Path, error: OSError) -> NotSaved:
        steps = self.saved_steps()
        safe = f"the checkpoint of step {steps[-1]} is complete" if steps else "no checkpoint was complete yet"
        return not_written(path, error, "start the same command again", safe)


def _free_name(path: Path) -> Path:
    """The path, or with the first number behind it that nothing has yet."""
    names = (path.with_name(f"{path.name}{number}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def flush_to_disk(folder: Path) -> None:
    """Return when everything in the folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def _synced_length(path: Path) -> int:
    if not path.exists():
        return 0
    sync(path)
    return path.stat().st_size


def sync(path: Path) -> None:
    """Return when a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
