"""A run of two processes, killed (SIGKILL) at ten seeded moments, four of them in a save, and started again each time:
bit for bit the run that was never touched. Only by `-m exhaustive`; by default two saves of the numpy policy, whose
starts are cheaper. Fewer kills of the engines are in test_teams.py and test_resume.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.runs import lowercase_run, read_lines, saved_steps, untimed, wait_until
from tests.teams import BOARD, finished, started
from tests.training import saved_state

# Engine -> (its program, steps: enough that ten kills come before the end).
ENGINES = {
    "numpy": ("tests.numpy_trainer", 40),
    "torch": ("safework_torch.main", 60),
    "jax": ("safework_jax.main", 60),
}
IN_A_SAVE, ANYWHERE = "in a save", "anywhere"
MOMENTS = random.Random(20_260_101).sample([*[IN_A_SAVE] * 4, *[ANYWHERE] * 6], 10)


def killed_run(folder: Path, engine: str) -> tuple[str, ...]:
    """A run in which everything that a checkpoint must carry matters, with a checkpoint after every step."""
    run_file = lowercase_run(
        folder,
        run={"steps": ENGINES[engine][1]},
        backend={"name": "torch" if engine == "numpy" else engine},
        rollout={"prompts_per_step": 3},
        batch={"rows_per_microbatch": 2},
        loss={"old_logprobs": "recompute", "kl_coef": 0.05},
        optimizer={"learning_rate": 1e-2, "warmup_fraction": 0.25, "floor_fraction": 0.1},
        checkpoint={"every": 1},
        advantage={"max_refills": 1},
        ema={"decay": 0.8},
    )
    return ("train", str(run_file), *(["backend.jax.mesh={fsdp: 2}"] if engine == "jax" else []))


def half_written(folder: Path) -> bool:
    """Whether there is a part of a checkpoint newer than all complete ones."""
    steps = [int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("*.partial")]
    return max(steps, default=0) > max(saved_steps(folder), default=0)


def stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Hold both where they are, so that nothing changes between a look and the kill."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)


def kill(processes: Sequence[subprocess.Popen[str]], folder: Path, moment: str, rng: random.Random) -> None:
    """Kill both processes in a save, or one of them anywhere in the steps after the next checkpoint."""
    wait_until(lambda: bool(saved_steps(folder)), processes[0])
    if moment == IN_A_SAVE:
        while True:
            wait_until(lambda: half_written(folder), processes[0], pause=0.0)
            stop(processes)
            if half_written(folder):
                break
            for process in processes:
                process.send_signal(signal.SIGCONT)
        for process in processes:
            process.kill()
        return
    known = max(saved_steps(folder))
    wait_until(lambda: max(saved_steps(folder)) > known, processes[0])
    time.sleep(rng.uniform(0.0, 0.1))
    processes[rng.randrange(2)].kill()


def test_kills_change_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path, "numpy", (IN_A_SAVE, IN_A_SAVE))


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_ten_kills_change_nothing(tmp_path: Path, engine: str) -> None:
    check_kills(tmp_path, engine, MOMENTS)


def check_kills(tmp_path: Path, engine: str, moments: Sequence[str]) -> None:
    """One run without a kill, one with all of them."""
    module, steps = ENGINES[engine]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    rng, words, folder = random.Random(7), killed_run(killed, engine), killed / "run"
    boards = [tmp_path / f"board-{number}" for number in range(12)]
    for board in boards:
        board.mkdir()
    with started(2, module, *killed_run(straight, engine), **{BOARD: str(boards[-1])}) as processes:
        assert [each.returncode for each in finished(processes)] == [0, 0]
    for number, moment in enumerate(moments):
        with started(2, module, *words, **{BOARD: str(boards[number])}) as processes:
            kill(processes, folder, moment, rng)
            assert all(each.returncode for each in finished(processes))
        assert 0 < max(saved_steps(folder)) < steps
        assert half_written(folder) or moment == ANYWHERE
    with started(2, module, *words, **{BOARD: str(boards[-2])}) as processes:
        done = finished(processes)
    assert [each.returncode for each in done] == [0, 0], done
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(read_lines(folder / name)) == untimed(read_lines(straight / "run" / name)), name
    last = f"run/checkpoints/step-{steps:06d}"
    found, expected = saved_state(killed / last), saved_state(straight / last)
    assert found.keys() == expected.keys() and any(name.startswith("ema/") for name in found)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert not list(folder.glob("checkpoints/*.partial"))
