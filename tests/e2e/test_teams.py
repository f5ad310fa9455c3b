"""A run in several processes: the same steps as in one, each host scoring its share, and all ending with one."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import lowercase_run, read_lines, safework, saved_steps, untimed, wait_until
from tests.teams import finished, started

ENGINES = {"torch": "safework_torch.main", "jax": "safework_jax.main"}


def run_of(folder: Path, engine: str, **sections: dict[str, Any]) -> Path:
    """Three prompts an update, so that they do not divide over the processes."""
    tables: dict[str, dict[str, Any]] = {
        "backend": {"name": engine},
        "rollout": {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 6},
        "batch": {"row_tokens": 128, "rows_per_microbatch": 4},
        "optimizer": {"learning_rate": 0.02, "warmup_fraction": 0.0},
        "ema": {"decay": 0.5},
        "model": {"frozen": ["model.embed_tokens.*", "*.up_proj.weight"]},
        "evaluation": {"at_ends": True, "samples": 1, "weights": "ema"},
    }
    for name, changes in sections.items():
        tables[name] = {**tables.get(name, {}), **changes}
    return lowercase_run(folder, **tables)


def overrides(engine: str, count: int) -> list[str]:
    """What an engine must be told of so many processes."""
    return [f"backend.jax.mesh.fsdp={count}"] if engine == "jax" else []


def close(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Records that say the same but for rounding."""
    assert len(first) == len(second) > 0
    for left, right in zip(untimed(first), untimed(second), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == (pytest.approx(value, rel=2e-4, abs=2e-6) if isinstance(value, float) else value), key


@pytest.fixture(scope="module", params=ENGINES)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An engine, and the folder of its run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = safework("train", run_of(folder, request.param))
    assert done.returncode == 0, done.stderr
    return request.param, folder / "run"


def test_several_processes_do_the_steps_of_one(tmp_path: Path, alone: tuple[str, Path]) -> None:
    count, (engine, one) = 4, alone
    words = (run_of(tmp_path / "many", engine), *overrides(engine, count))
    with started(count, ENGINES[engine], "train", *words, hosts=2) as processes:
        done = finished(processes)
    assert [each.returncode for each in done] == [0] * count, done
    many = tmp_path / "many" / "run"
    close(read_lines(one / "metrics.jsonl"), read_lines(many / "metrics.jsonl"))
    close(read_lines(one / "evaluation.jsonl"), read_lines(many / "evaluation.jsonl"))
    ours, theirs = (read_lines(folder / "rollouts.jsonl") for folder in (one, many))
    assert [record["token_ids"] for record in ours] == [record["token_ids"] for record in theirs]
    assert saved_steps(one) == saved_steps(many)
    said = [[line for line in each.stdout.splitlines() if not line.startswith("[Gloo]")] for each in done]
    assert said[0][-1].startswith("done: ") and not any(said[1:])


def test_a_run_goes_on_in_other_numbers_of_processes(tmp_path: Path, alone: tuple[str, Path]) -> None:
    """The same prompts in the same order, the same losses and tokens: each process reads what it holds of the state."""
    engine, one = alone
    run_file, folder = run_of(tmp_path, engine), tmp_path / "run"
    for steps, count in ((2, 2), (3, 1), (4, 4)):
        words = (f"run.steps={steps}", "evaluation.at_ends=false", *overrides(engine, count))
        with started(count, ENGINES[engine], "train", run_file, *words) as processes:
            done = finished(processes)
        assert [each.returncode for each in done] == [0] * count, done
        parts = list((folder / "checkpoints" / f"step-{steps:06d}").glob("model*.safetensors"))
        assert len(parts) == count
    close(read_lines(one / "metrics.jsonl"), read_lines(folder / "metrics.jsonl"))
    ours, theirs = (read_lines(each / "rollouts.jsonl") for each in (one, folder))
    for key in ("step", "prompt_id", "token_ids"):
        assert [record[key] for record in ours] == [record[key] for record in theirs]


def kill_one(engine: str, run_file: Path, killed: int, *words: str) -> None:
    """Kill one of two processes behind the first checkpoint: the other says so and ends."""
    folder = run_file.parent / "run"
    with started(2, ENGINES[engine], "train", run_file, *words) as processes:
        wait_until(lambda: bool(saved_steps(folder)), processes[0])
        begun = time.monotonic()
        processes[killed].kill()
        done = finished(processes)
        assert time.monotonic() - begun < 60
    other = done[1 - killed]
    assert other.returncode == 1, other
    assert re.search(rf"error: process {killed} of 2 \(.+\) ended without a word", other.stderr)


@pytest.mark.parametrize(("engine", "killed"), [("torch", 0), ("jax", 1)])
def test_a_killed_process_ends_the_other(tmp_path: Path, engine: str, killed: int) -> None:
    kill_one(engine, run_of(tmp_path, engine), killed, "run.steps=100", *overrides(engine, 2))


@pytest.mark.parametrize(("engine", "killed"), [("torch", 1), ("jax", 0)])
def test_going_on_after_a_kill_equals_never_stopped(tmp_path: Path, engine: str, killed: int) -> None:
    words = ("run.steps=5", "evaluation.at_ends=false", *overrides(engine, 2))
    folder, run_file = tmp_path / "one" / "run", run_of(tmp_path / "one", engine)
    kill_one(engine, run_file, killed, *words)
    with started(2, ENGINES[engine], "train", run_file, *words) as processes:
        assert [each.returncode for each in finished(processes)] == [0, 0]
    never = run_of(tmp_path / "never", engine)
    with started(2, ENGINES[engine], "train", never, *words) as processes:
        assert [each.returncode for each in finished(processes)] == [0, 0]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert untimed(read_lines(folder / name)) == untimed(read_lines(tmp_path / "never" / "run" / name))


@pytest.mark.parametrize(("engine", "number"), [("torch", signal.SIGINT), ("jax", signal.SIGTERM)])
def test_a_signal_in_one_process_saves_and_stops_all(tmp_path: Path, engine: str, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    words = ("run.steps=1000", "checkpoint.every=1000", *overrides(engine, 2))
    with started(2, ENGINES[engine], "train", run_of(tmp_path, engine), *words) as processes:
        wait_until(lambda: len(read_lines(folder / "metrics.jsonl")) > 1, processes[0])
        processes[1].send_signal(number)
        done = finished(processes)
    assert [each.returncode for each in done] == [130, 130], done
    [step] = saved_steps(folder)
    assert f"stopped and saved after step {step} of 1000" in done[0].stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_do_not_divide_are_refused(tmp_path: Path, engine: str) -> None:
    words = ("batch.rows_per_microbatch=3", *overrides(engine, 2))
    with started(2, ENGINES[engine], "train", run_of(tmp_path, engine), *words) as processes:
        done = finished(processes)
    assert [each.returncode for each in done] == [1, 1]
    for each in done:
        assert "batch.rows_per_microbatch = 3" in each.stderr and "Traceback" not in each.stderr
        assert "Choose a multiple of 2." in each.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mistake_that_one_process_sees_ends_all_with_its_sentence(tmp_path: Path, engine: str) -> None:
    run_file = run_of(tmp_path, engine)
    (tmp_path / "run").write_text("no folder")
    begun = time.monotonic()
    with started(2, ENGINES[engine], "train", run_file, *overrides(engine, 2)) as processes:
        done = finished(processes)
    assert time.monotonic() - begun < 60
    assert [each.returncode for each in done] == [1, 1], done
    assert done[0].stderr.startswith("error: run.dir = ")
    assert re.search(r"error: process 0 of 2 \(.+\) stopped: run.dir = ", done[1].stderr)
