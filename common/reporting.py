"""What a person sees of a run: progress with time left, a row a step, a sample now and then; and the W&B mirror."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from common.config.run import RunConfig
from common.config.section import ConfigError
from common.rewards.scorer import ScoredGroup

COLUMNS = {
    "reward/mean": "reward",
    "reward/std": "std",
    "policy/entropy": "entropy",
    "mismatch/kl": "mismatch",
    "grad_norm": "grad norm",
    "response/length_mean": "length",
    "groups/uninformative_fraction": "uninformative",
    "time/step_s": "seconds",
}


class Wandb(Protocol):
    """What is used of a W&B run."""

    def log(self, data: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def leave_unread(stream: TextIO) -> None:
    """What is still printed to a stream goes nowhere, instead of raising because its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class UnwatchedConsole(Console):
    """Falls silent when its reader has gone, like `tee` after Ctrl-C: a run goes on and saves without being watched."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        leave_unread(sys.stdout)


class Reporter:
    """Console and W&B output of one run; none at all where `shown` is off. Use as a context."""

    def __init__(self, config: RunConfig, first_step: int, shown: bool) -> None:
        self._config = config
        self._console = UnwatchedConsole(quiet=not shown)
        self._wandb = _open_wandb(config) if shown else None
        self._training_s, self._first = 0.0, first_step
        self._progress = Progress(
            TextColumn("steps"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=config.run.steps, completed=first_step)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish()

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, metrics: dict[str, float], groups: Sequence[ScoredGroup]) -> None:
        """Show a finished step; its metrics go to W&B as they are."""
        done = int(metrics["step"]) + 1
        self._training_s += metrics["time/step_s"]
        self._progress.update(self._task, completed=done)
        if self._console.is_terminal:
            self._console.print(_table(metrics))
        else:
            self.say(self._line(metrics, done))
        if (done - 1) % self._config.metrics.sample_every == 0:
            self._sample(groups[0])
        if self._wandb is not None:
            self._wandb.log(metrics, step=int(metrics["step"]))

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Show a held-out evaluation."""
        parts = ", ".join(f"{key.removeprefix('reward/')} {value:.3f}" for key, value in _rewards(metrics).items())
        seconds = metrics["time/evaluation_s"]
        self.say(
            f"held-out after step {metrics['step']}: reward {metrics['reward/mean']:.3f} ({parts}), {seconds:.0f} s"
        )
        if self._wandb is not None:
            self._wandb.log({f"heldout/{key}": value for key, value in metrics.items()}, step=int(metrics["step"]))

    def _line(self, metrics: dict[str, float], done: int) -> str:
        shown = "  ".join(f"{title} {metrics[key]:.4g}" for key, title in COLUMNS.items())
        parts = "  ".join(f"{key} {value:.3f}" for key, value in _rewards(metrics).items())
        # Steps alone: evaluations and checkpoints between them come on top.
        left = self._training_s / (done - self._first) * (self._config.run.steps - done)
        return f"step {done}/{self._config.run.steps}  {shown}  {parts}  left {left / 60:.1f} min"

    def _sample(self, scored: ScoredGroup) -> None:
        prompt, rollout, reward = scored.group.prompt, scored.group.rollouts[0], scored.rewards[0]
        scores = ", ".join(f"{name} {score.value:.2f}" for name, score in reward.scores.items())
        text = f"{prompt.messages[-1].content}\n-> {rollout.text}\n[{prompt.label}: {reward.total:.2f} ({scores})]"
        if self._console.is_terminal:
            self._console.print(Panel(escape(text), title="a sample"))
        else:
            self.say(text)


def _rewards(metrics: dict[str, float]) -> dict[str, float]:
    aggregate = ("reward/mean", "reward/std")
    return {key: value for key, value in metrics.items() if key.startswith("reward/") and key not in aggregate}


def _table(metrics: dict[str, float]) -> Table:
    table = Table(title=f"step {int(metrics['step']) + 1}", title_justify="left")
    cells = {title: metrics[key] for key, title in COLUMNS.items()} | _rewards(metrics)
    for title in cells:
        table.add_column(title, justify="right")
    table.add_row(*(f"{value:.4g}" for value in cells.values()))
    return table


def _open_wandb(config: RunConfig) -> Wandb | None:
    if config.metrics.wandb == "off":
        return None
    try:
        import wandb  # late: optional, and slow to import
    except ImportError:
        raise ConfigError(
            f"metrics.wandb = {config.metrics.wandb!r}: the package wandb is not installed. "
            "Install it with pip install 'safework[wandb]', or set metrics.wandb to off."
        ) from None
    folder = Path(config.run.dir).expanduser()
    try:
        return wandb.init(
            project=config.metrics.wandb_project,
            name=folder.name,
            dir=folder,
            mode=config.metrics.wandb,
            config=config.model_dump(),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"metrics.wandb = {config.metrics.wandb!r}: W&B could not be opened ({error}). "
            "Set WANDB_API_KEY in the environment, or metrics.wandb to offline or off."
        ) from None


class CountingProgress:
    """How far the scoring of so many `things` is, of which `done` were scored before: a bar on a terminal, a line a
    chunk elsewhere; with the rate and the time left. Use as a context.
    """

    def __init__(self, console: UnwatchedConsole, things: str, done: int, total: int) -> None:
        self._console, self._things, self._before, self._total = console, things, done, total
        self._done = done
        self._progress = Progress(
            TextColumn(things),
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

    def __enter__(self) -> CountingProgress:
        self._started = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int, missing: int) -> None:
        """Show that so many more are done; `missing`: scores that are missing so far."""
        self._done += count
        rate = (self._done - self._before) / (time.perf_counter() - self._started)
        said = f"{rate:.1f} {self._things}/s, {missing} missing"
        self._progress.update(self._task, completed=self._done, rate=said)
        if not self._console.is_terminal:
            left = (self._total - self._done) / rate / 60
            self._console.print(f"{self._done}/{self._total}  {said}, left {left:.1f} min", highlight=False)
