"""What a killed step had sampled and scored is taken, not done again: the records are those of a run never killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
        file.write('null\n[]\n{"a": 1}\n{"key": {"save": 1, "half a li')
    run = train(run_file)
    assert run.status == 0
    total = straight.trainer.calls["sample"]
    assert run.trainer.calls["sample"] == total - at
    assert calls(tmp_path) == total + 1  # that in which it was killed, once more
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(read_lines(run.folder / name)) == untimed(read_lines(straight.folder / name))


def spoiled_content(record: dict[str, Any]) -> None:
    record["content"] = [{}] * len(record["content"])


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "of another save": lambda record: record["key"].update(save="other"),
    "of another seed": lambda record: record["key"].update(seed=4),
    "without groups": lambda record: record.update(content=[]),
    "with groups of another shape": spoiled_content,
}


@pytest.mark.parametrize("change", CHANGES)
def test_lines_that_are_no_use_are_done_again(change: str, tmp_path: Path, straight: Trained) -> None:
    run_file = killed_and_changed(tmp_path, CHANGES[change])
    run = train(run_file)
    assert run.status == 0
    assert run.trainer.calls["sample"] > straight.trainer.calls["sample"] - KILLED_AT
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(read_lines(run.folder / name)) == untimed(read_lines(straight.folder / name))


def test_changed_code_scores_again_what_was_sampled(tmp_path: Path, straight: Trained) -> None:
    def change(record: dict[str, Any]) -> None:
        if record["kind"] == "results":
            assert len(record["key"]["sources"][f"{__name__}:Fatal"]) == 64
            record["key"]["sources"] = {f"{__name__}:Fatal": "other"}

    run = train(killed_and_changed(tmp_path, change))
    total = straight.trainer.calls["sample"]
    assert run.trainer.calls["sample"] == total - KILLED_AT
    assert calls(tmp_path) > total + 1


KILLED_AT = 6  # in a refill: the step has lines of both kinds


def killed_and_changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A run killed in a refill, each line of its journal changed."""
    run_file = journaled_run(folder, KILLED_AT)
    assert finish(start("tests.numpy_trainer", "train", run_file)).returncode == -signal.SIGKILL
    journal = folder / "run" / "journal.jsonl"
    records = read_lines(journal)
    assert {record["kind"] for record in records} == {"rollouts", "results"}
    for record in records:
        change(record)
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_file
