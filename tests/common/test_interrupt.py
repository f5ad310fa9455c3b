"""A run in a process of its own, on the numpy trainer: the first signal lets it finish its step and save, the second
stops it at once, and what it saved goes on. And the memory of a run of fifty steps.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.numpy_run import train
from tests.runs import (
    DEADLINE,
    finish,
    lowercase_run,
    read_lines,
    running,
    saved_steps,
    start,
    to_go_on,
    untimed,
    wait_until,
)

ENGINE = "tests.numpy_trainer"


def metric_lines(folder: Path) -> int:
    return len(read_lines(folder / "metrics.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    run_file = lowercase_run(tmp_path / "stopped", checkpoint={"every": 1000})
    folder = run_file.parent / "run"
    with running(ENGINE, "train", run_file, "run.steps=100000") as process:
        wait_until(lambda: metric_lines(folder) >= 3, process)
        process.send_signal(number)
        stopped = finish(process)
    assert stopped.returncode == 130
    done = metric_lines(folder)
    assert saved_steps(folder) == [done]
    assert "Traceback" not in stopped.stderr
    assert "stopping after this step (Ctrl-C: at once, losing it)" in stopped.stderr
    said = f"stopped and saved after step {done} of 100000. "
    assert to_go_on(stopped, said) == ["train", str(run_file), "run.steps=100000"]

    going_on = train(run_file, f"run.steps={done + 2}", "checkpoint.every=1")
    straight = train(lowercase_run(tmp_path / "straight"), f"run.steps={done + 2}")
    assert going_on.status == straight.status == 0
    assert untimed(going_on.metrics) == untimed(straight.metrics)
    assert going_on.rollouts == straight.rollouts


def test_further_sigterms_change_nothing_and_one_before_the_loop_stops_at_once(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path, checkpoint={"every": 1000})
    folder = run_file.parent / "run"
    slow = ("evaluation.every=3", "evaluation.samples=600")
    with running(ENGINE, "train", run_file, "run.steps=100000", *slow) as process:
        wait_until(lambda: metric_lines(folder) == 3, process)
        for _ in range(3):  # of the launcher, of the scheduler, of a person
            process.send_signal(signal.SIGTERM)
        stopped = finish(process)
    assert stopped.returncode == 130 and saved_steps(folder) == [3]

    loading = ("run.steps=4", "evaluation.at_ends=true", "evaluation.samples=200000")
    again = lowercase_run(tmp_path / "early")
    with running(ENGINE, "train", again, *loading) as process:
        wait_until((tmp_path / "early" / "run" / "config.yaml").exists, process, pause=0)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        stopped = finish(process)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_run_whose_reader_has_gone_goes_on_and_saves(tmp_path: Path, both: bool) -> None:
    # Ctrl-C ends `| tee log` as well, and it is gone before the step is finished.
    run_file = lowercase_run(tmp_path, checkpoint={"every": 1000})
    folder = run_file.parent / "run"
    with running(ENGINE, "train", run_file, "run.steps=100000") as process:
        wait_until(lambda: metric_lines(folder) >= 3, process)
        for stream in (process.stdout, process.stderr if both else None):
            if stream is not None:
                stream.close()
        printed = metric_lines(folder) + 3
        wait_until(lambda: metric_lines(folder) >= printed, process)
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE)
    assert process.returncode == 130
    assert saved_steps(folder) == [metric_lines(folder)]


def test_a_second_signal_stops_at_once_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path / "stopped")
    folder = train(run_file).folder
    # The fifth step ends in an evaluation of minutes.
    slow = ("evaluation.every=5", "evaluation.samples=200000")
    with running(ENGINE, "train", run_file, "run.steps=6", *slow) as process:
        wait_until(lambda: metric_lines(folder) == 5, process)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == "stopping after this step (Ctrl-C: at once, losing it)\n"
        process.send_signal(signal.SIGINT)
        stopped = finish(process)
    assert stopped.returncode == 130
    assert stopped.stderr == "stopped at once; what was done since the last checkpoint is lost.\n"
    assert saved_steps(folder) == [2, 4]
    assert read_lines(folder / "evaluation.jsonl") == []

    going_on = train(run_file, "run.steps=6")
    straight = train(lowercase_run(tmp_path / "straight"), "run.steps=6")
    assert untimed(going_on.metrics) == untimed(straight.metrics)
    assert going_on.rollouts == straight.rollouts


def test_memory_stays_flat_over_fifty_steps(tmp_path: Path) -> None:
    # A loop that kept what a step rolled out, scored and trained on would grow by ten MiB from the tenth step on.
    rollout = {"prompts_per_step": 8, "group_size": 12, "max_new_tokens": 40}
    run_file = lowercase_run(tmp_path, run={"steps": 50}, rollout=rollout)
    assert finish(start(ENGINE, "train", run_file)).returncode == 0
    peaks = [record["memory/peak_gib"] * 1024 for record in read_lines(run_file.parent / "run" / "metrics.jsonl")]
    assert len(peaks) == 50
    assert peaks[-1] - peaks[9] < 4
