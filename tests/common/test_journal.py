"""What a killed step had sampled and scored is taken, not done again: the records are those of a run never killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.types import Sample, Score
from tests.numpy_run import Trained, train
from tests.runs import finish, lowercase_run, read_lines, start, untimed

NEVER = 0


class Fatal:
    """A reward model that notes each call, and at one of them, counted over all processes, kills its own process."""

    def __init__(self, run: str, at: int) -> None:
        self._folder, self._at = Path(run), at

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        calls = self._folder / "calls"
        with calls.open("a") as file:
            file.write(f"{len(samples)}\n")
        if len(calls.read_text().splitlines()) == self._at:
            while list(self._folder.glob("run/checkpoints/*.partial")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        # Prompts with odd numbers teach nothing, so that a step is refilled.
        tokens = [sample.rollout.token_ids for sample in samples]
        taught = [int(sample.prompt.id.removeprefix("p")) % 2 == 0 for sample in samples]
        return [Score(float(ids.sum() % 7) * even, "mod 7", "odd") for ids, even in zip(tokens, taught, strict=True)]


def journaled_run(folder: Path, at: int) -> Path:
    options = {"run": str(folder), "at": at}
    return lowercase_run(
        folder,
        rewards={
            "verifiers": {"fatal": {"reward_model": f"{__name__}:Fatal", "options": options}},
            "recipe": {"instruction_rule": {"fatal": 1.0}},
        },
        advantage={"max_refills": 2},
        checkpoint={"every": 1},
    )


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("straight")
    run = train(journaled_run(folder, NEVER))
    assert run.status == 0
    assert calls(folder) == run.trainer.calls["sample"] > len(run.metrics) + 2  # some steps are refilled
    return run


@pytest.mark.parametrize("at", [4, 6])
def test_a_run_killed_while_it_scored_asks_and_samples_only_the_rest(
    tmp_path: Path, straight: Trained, at: int
) -> None:
    run_file = journaled_run(tmp_path, at)
    killed = finish(start("tests.numpy_trainer", "train", run_file))
    assert killed.returncode == -signal.SIGKILL, killed
    with (tmp_path / "run" / "journal.jsonl").open("a") as file:
        file.write('{"key": {"step": 1, "half a li')
    run = train(run_file)
    assert run.status == 0
    total = straight.trainer.calls["sample"]
    assert run.trainer.calls["sample"] == total - at
    assert calls(tmp_path) == total + 1  # that in which it was killed, once more
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(read_lines(run.folder / name)) == untimed(read_lines(straight.folder / name))


def test_other_weights_never_take_it(tmp_path: Path, straight: Trained) -> None:
    """The rollouts of the step before, or those of another seed, are no use."""
    run_file = journaled_run(tmp_path, NEVER)
    folder = train(run_file, "run.steps=2").folder
    lines = (straight.folder / "journal.jsonl").read_text()
    (folder / "journal.jsonl").write_text(lines.replace('"seed": 3', '"seed": 4') + lines)
    assert '"step": 3' in lines
    run = train(run_file)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(read_lines(run.folder / name)) == untimed(read_lines(straight.folder / name))
    assert (run.folder / "journal.jsonl").read_text() == lines
