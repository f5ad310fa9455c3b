"""A run of the loop on the numpy trainer within the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from common.engine_main import Engine, run_verb
from tests.numpy_trainer import NumpyTrainer, open_judge, open_trainer
from tests.runs import read_lines
from tests.teams import open_team


class Trained(NamedTuple):
    """What a run left: its exit status, the trainers it opened (none where it stopped before) and its folder."""

    status: int
    trainers: list[NumpyTrainer]
    folder: Path

    @property
    def trainer(self) -> NumpyTrainer:
        [trainer] = self.trainers
        return trainer

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "rollouts.jsonl")

    def step(self, number: int) -> list[dict[str, Any]]:
        """The rollouts of one step."""
        return [record for record in self.rollouts if record["step"] == number]


def train(run_file: Path, *words: str) -> Trained:
    """`train` with the numpy engine, in this process."""
    opened: list[NumpyTrainer] = []

    def open_and_keep(*arguments: Any) -> NumpyTrainer:
        opened.append(open_trainer(*arguments))
        return opened[-1]

    status = run_verb(Engine(open_team, open_and_keep, open_judge), ["train", str(run_file), *words])
    return Trained(status, opened, run_file.parent / "run")
