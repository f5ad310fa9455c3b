"""A run killed (SIGKILL) three times at seeded moments, once inside a save, and started again each time, equals the run
that was never touched: metrics, rollouts, evaluations and final weights, on both engines, through the command itself.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import finish, lowercase_run, read_lines, running, safework, saved_steps, untimed, wait_until

STEPS, PROMPTS, GROUP = 12, 4, 4


def exercised_run(folder: Path, engine: str) -> Path:
    """A run in which everything that a checkpoint must carry matters."""
    verifiers = {"instruction_rule": {"instructions": 1.0, "task_format": 0.5}}
    return lowercase_run(
        folder,
        run={"steps": STEPS},
        backend={"name": engine},
        rollout={"prompts_per_step": PROMPTS, "group_size": GROUP},
        rewards={"recipe": verifiers},
        advantage={"type": "gdpo"},
        loss={"old_logprobs": "recompute", "updates_per_rollout": 2, "kl_coef": 0.05},
        optimizer={"learning_rate": 1e-2, "warmup_fraction": 0.25, "floor_fraction": 0.1},
        evaluation={"at_ends": True, "every": 5, "samples": 1},
    )


def train_and_kill(run_file: Path, kill: Callable[[subprocess.Popen[str], Path], None]) -> None:
    """Start the run and let `kill` do it at its moment."""
    with running("common.cli", "train", run_file) as process:
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)  # so that on a busy machine the watcher never comes too late
        kill(process, run_file.parent / "run")
        assert finish(process).returncode == -signal.SIGKILL


def after_step(number: int) -> Callable[[subprocess.Popen[str], Path], None]:
    """Kill as soon as that many steps are recorded."""

    def kill(process: subprocess.Popen[str], folder: Path) -> None:
        wait_until(lambda: len(read_lines(folder / "metrics.jsonl")) >= number, process)
        process.kill()

    return kill


def within_step(number: int) -> Callable[[subprocess.Popen[str], Path], None]:
    """Kill as soon as the rollouts of that step, from 0, are written."""

    def kill(process: subprocess.Popen[str], folder: Path) -> None:
        wait_until(lambda: len(read_lines(folder / "rollouts.jsonl")) > number * PROMPTS * GROUP, process)
        process.kill()

    return kill


def within_a_save(process: subprocess.Popen[str], folder: Path) -> None:
    """Kill while a checkpoint newer than all complete ones is half written."""
    known = saved_steps(folder)

    def half_written() -> bool:
        steps = [int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("*.partial")]
        return max(steps, default=0) > max(saved_steps(folder))

    assert known
    while True:
        wait_until(half_written, process, pause=0.0)
        # Stopped first, so that it cannot finish the save between the look and the kill.
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if half_written():
            process.kill()
            return
        process.send_signal(signal.SIGCONT)


def test_a_run_goes_on_on_the_other_engine_and_back(tmp_path: Path) -> None:
    run_file = exercised_run(tmp_path, "torch")
    for steps, engine in ((1, "torch"), (2, "jax"), (3, "torch")):
        changes = (f"run.steps={steps}", f"backend.name={engine}", "evaluation.at_ends=false", "ema.decay=0.9")
        done = safework("train", run_file, *changes)
        assert done.returncode == 0, done.stderr
        assert steps == 1 or f"resuming after step {steps - 1}, {steps} steps on {engine}" in done.stdout
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def weights(run_file: Path) -> str:
    return hashlib.sha256((run_file.parent / "run" / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_a_killed_run_equals_one_that_was_never_killed(tmp_path: Path, engine: str) -> None:
    straight, killed = exercised_run(tmp_path / "straight", engine), exercised_run(tmp_path / "killed", engine)
    assert safework("train", straight).returncode == 0

    moments = random.Random(20_260_101)
    train_and_kill(killed, after_step(moments.randint(2, 4)))
    train_and_kill(killed, within_step(moments.randint(5, 7)))
    train_and_kill(killed, within_a_save)
    assert list(killed.parent.glob("run/checkpoints/*.partial"))
    resumed = safework("train", killed)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step " in resumed.stdout

    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl"):
        expected = read_lines(straight.parent / "run" / name)
        assert untimed(read_lines(killed.parent / "run" / name)) == untimed(expected), name
        assert expected
    metrics = read_lines(killed.parent / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(STEPS))
    assert all(record["tokens/trained"] > 0 for record in metrics)
    assert weights(killed) == weights(straight)
    assert not list(killed.parent.glob("run/checkpoints/*.partial"))
