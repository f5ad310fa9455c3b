"""A run of fifty steps on each engine: its memory stays flat, Ctrl-C lets it finish its step and save, and the command
that it names goes on from there.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runs import finish, lowercase_run, read_lines, running, safework, saved_steps, to_go_on, wait_until


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_fifty_steps_stay_flat_and_an_interrupt_saves_them(tmp_path: Path, engine: str) -> None:
    run_file = lowercase_run(
        tmp_path,
        backend={"name": engine},
        rollout={"group_size": 8},
        checkpoint={"every": 1000},
        optimizer={"learning_rate": 1e-3},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    with running("common.cli", "train", run_file, "run.steps=100000") as process:
        wait_until(lambda: len(read_lines(metrics)) >= 50, process)
        process.send_signal(signal.SIGINT)
        stopped = finish(process)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    records = read_lines(metrics)
    assert saved_steps(tmp_path / "run") == [len(records)]
    peaks = [record["memory/peak_gib"] * 1024 for record in records]
    assert peaks[49] - peaks[9] < 4

    going_on = safework(*to_go_on(stopped), f"run.steps={len(records) + 2}")
    assert going_on.returncode == 0, going_on.stderr
    assert [record["step"] for record in read_lines(metrics)] == list(range(len(records) + 2))
