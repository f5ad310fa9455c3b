"""How far scoring is: a bar on a terminal, a line a chunk elsewhere; with the rate and the time left."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.reporting import UnwatchedConsole


class ScoringProgress:
    """Progress over the records of a file, of which `done` were scored before. Use as a context."""

    def __init__(self, console: UnwatchedConsole, done: int, total: int) -> None:
        self._console, self._before, self._total = console, done, total
        self._done = done
        self._progress = Progress(
            TextColumn("records"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            speed_estimate_period=3600,  # chunks are far between
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=done, rate="")

    def __enter__(self) -> ScoringProgress:
        self._started = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, records: int, missing: int) -> None:
        """Show that so many more records are written; `missing`: scores that are missing so far."""
        self._done += records
        rate = (self._done - self._before) / (time.perf_counter() - self._started)
        said = f"{rate:.1f} records/s, {missing} missing"
        self._progress.update(self._task, completed=self._done, rate=said)
        if not self._console.is_terminal:
            left = (self._total - self._done) / rate / 60
            self._console.print(f"{self._done}/{self._total}  {said}, left {left:.1f} min", highlight=False)
