"""A run that goes on: from its newest checkpoint, with its records cut back to it, as if it had never stopped; and the
runs that do not go on, each saying why.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from common.algorithms.schedule import learning_rate
from common.config import load_config
from common.disk import NotSaved
from common.run_dir import LoopState, RunDir
from common.state_files import MANIFEST, save_tensors, seal, whole, write_part
from common.types import TrainingState
from tests.numpy_run import Trained, train
from tests.runs import lowercase_run, read_lines, saved_steps, untimed
from tests.training import saved_state

RECORDS = ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl")


def exercised_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run with two updates a rollout, a reference, refills and evaluations."""
    loss = {"old_logprobs": "recompute", "updates_per_rollout": 2, "kl_coef": 0.01}
    defaults: dict[str, dict[str, Any]] = {
        "run": {"steps": 6},
        "loss": loss,
        "advantage": {"max_refills": 1},
        "evaluation": {"every": 3},
    }
    return lowercase_run(folder, **{**defaults, **sections})


def assert_equal_runs(found: Trained, expected: Trained) -> None:
    for name in RECORDS:
        assert untimed(read_lines(found.folder / name)) == untimed(read_lines(expected.folder / name)), name
    for run in (found, expected):
        assert len(run.metrics) == 6
    state, other = (saved_state(run.folder / "checkpoints" / "step-000006") for run in (found, expected))
    assert state.keys() == other.keys()
    for name, array in other.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def unchanged(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file of a run with the time it was written; config.yaml is written at each start."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.name != "config.yaml" and path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, stop: int) -> None:
    straight = train(exercised_run(tmp_path / "straight"))
    run_file = exercised_run(tmp_path / "stopped")
    train(run_file, f"run.steps={stop}")
    assert_equal_runs(train(run_file), straight)


def test_what_a_killed_run_wrote_after_its_checkpoint_is_cut_off(tmp_path: Path) -> None:
    straight = train(exercised_run(tmp_path / "straight"))
    run_file = exercised_run(tmp_path / "killed")
    killed = train(run_file, "run.steps=4").folder
    for name in RECORDS:
        with (killed / name).open("a") as file:
            file.write('{"step": 4, "half a li')
    half_written = killed / "checkpoints" / "step-000005.partial"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half a fi")
    assert_equal_runs(train(run_file), straight)
    assert not half_written.exists()


def test_a_record_file_shorter_than_its_checkpoint_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file).folder
    (folder / "rollouts.jsonl").unlink()
    assert train(run_file, "run.steps=6").status == 1
    assert f"error: {folder / 'rollouts.jsonl'}: is shorter than the " in capsys.readouterr().err
    assert len(read_lines(folder / "metrics.jsonl")) == 4


def test_a_data_file_that_changed_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = lowercase_run(tmp_path)
    before = unchanged(train(run_file).folder)
    [source] = load_config([run_file]).config.data.train
    lines = Path(source.path).read_text().splitlines(keepends=True)
    Path(source.path).write_text("".join(lines[:-1]))
    refused = train(run_file, "run.steps=6")
    assert (refused.status, refused.trainers) == (1, [])
    assert f"error: {source.path}: changed since this run saved its step 4. " in capsys.readouterr().err
    assert unchanged(tmp_path / "run").keys() == before.keys()
    Path(source.path).write_text("".join(lines))
    assert len(train(run_file, "run.steps=6").metrics) == 6


def test_raised_steps_go_on_with_the_longer_schedule(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path, optimizer={"warmup_fraction": 0.25, "floor_fraction": 0.1})
    rule = load_config([run_file]).config.optimizer
    train(run_file)
    run = train(run_file, "run.steps=7")
    assert run.status == 0
    planned = [learning_rate(rule, step, 4 if step < 4 else 7) for step in range(7)]
    assert [record["learning_rate"] for record in run.metrics] == planned
    assert [record["step"] for record in run.metrics] == list(range(7))


def test_a_finished_run_says_so_and_leaves_all_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file).folder
    before = unchanged(folder)
    capsys.readouterr()
    again = train(run_file)
    assert again.status == 0
    assert again.trainers == []
    printed = capsys.readouterr().out
    assert printed == f"{folder}: already trained for 4 steps; raise run.steps to go on. Nothing to do.\n"
    assert unchanged(folder) == before


def test_a_run_killed_before_its_export_is_exported_when_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = lowercase_run(tmp_path)
    export = train(run_file).folder / "export"
    written = (export / "model.safetensors").read_bytes()
    shutil.rmtree(export)
    capsys.readouterr()
    assert train(run_file).status == 0
    assert capsys.readouterr().out.endswith("to go on. Its export was left to do, and is done.\n")
    assert (export / "model.safetensors").read_bytes() == written


def test_an_export_of_fewer_steps_is_written_anew(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file).folder
    shutil.move(folder / "export", tmp_path / "old")
    longer = train(run_file, "run.steps=6").folder / "export"
    written = (longer / "model.safetensors").read_bytes()
    shutil.rmtree(longer)
    shutil.move(tmp_path / "old", longer)
    assert (longer / "model.safetensors").read_bytes() != written
    assert train(run_file, "run.steps=6").status == 0
    assert (longer / "model.safetensors").read_bytes() == written


def test_a_changed_config_lists_what_must_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file).folder
    before = (folder / "config.yaml").read_text()
    capsys.readouterr()
    changed = train(run_file, "run.steps=6", "run.seed=9", "rollout.group_size=8", "metrics.sample_every=2")
    assert changed.status == 1
    assert changed.trainers == []
    error = capsys.readouterr().err
    assert error.startswith(f"error: run.dir = '{folder}' ({run_file}:1): holds a run of another config:\n")
    assert "run.seed: was 3, is 9" in error
    assert "rollout.group_size: was 4, is 8" in error
    assert "run.steps" not in error
    assert "sample_every" not in error
    assert "Give run.dir another folder, or set these keys back." in error
    assert (folder / "config.yaml").read_text() == before
    assert len(changed.metrics) == 4


def test_what_may_change_does_not_stop_a_run(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path)
    train(run_file)
    run = train(run_file, "run.steps=6", "checkpoint.every=1", "checkpoint.keep=3", "evaluation.every=5")
    assert run.status == 0
    assert saved_steps(run.folder) == [4, 5, 6]
    assert [record["step"] for record in read_lines(run.folder / "evaluation.jsonl")] == [5]


def test_weights_that_are_not_finite_stop_before_anything_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file).folder
    weights = folder / "checkpoints" / "step-000004" / "model.safetensors"
    table = load_file(weights)["table"].copy()
    table[:, 100] = np.nan
    with safe_open(weights, "np") as saved:
        metadata = saved.metadata()
    save_tensors({"table": table}, weights, metadata)
    run = train(run_file, "run.steps=6")
    assert run.status == 1
    assert "error: step 4: the policy's logprobs of a response to prompt 'p" in capsys.readouterr().err
    assert len(run.metrics) == 4
    assert len(run.step(4)) == 0
    assert saved_steps(folder) == [2, 4]


def test_the_newest_checkpoints_stay_and_none_goes_before_a_newer_is_complete(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    stood: list[list[int]] = []
    part = TrainingState({"model": {"w": whole(np.ones(3, np.float32))}}, 1)
    for step in range(1, 5):
        state = run_dir.begin_checkpoint(LoopState(step=step))
        write_part(part, run_dir.unfinished(step), 0, 1, state.save)
        stood.append(saved_steps(tmp_path))
        run_dir.complete_checkpoint(state, count=1, keep=2, deadline_s=1.0)
    assert stood == [[], [1], [1, 2], [2, 3]]
    assert run_dir.saved_steps() == [3, 4]
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"step": "4"}, "loop, 'step': Input should be a valid integer"),
        ({"cursor": -3}, "loop, 'cursor': Input should be greater than or equal to 0"),
        ({"record_bytes": {"metrics.jsonl": None}}, "loop, 'record_bytes.metrics.jsonl': "),
        ({"data": ["x"]}, "loop, 'data': "),
        ({"pace": 1}, "its loop has 'step', 'cursor', 'policy_version', 'record_bytes', 'data', 'save', 'pace'"),
        (None, "its loop has no entries"),
    ],
)
def test_what_is_no_state_of_a_loop_is_said(tmp_path: Path, entries: dict[str, Any] | None, said: str) -> None:
    run_dir = RunDir(tmp_path)
    folder = run_dir.checkpoint(4)
    folder.mkdir()
    write_part(TrainingState({"model": {"w": whole(np.ones(3, np.float32))}}, 1), folder, 0, 1)
    seal(folder, 1, {} if entries is None else {**asdict(LoopState(step=4)), **entries})
    with pytest.raises(NotSaved) as caught:
        run_dir.state()
    assert f"{folder / MANIFEST}: is damaged, or of another version ({said}" in str(caught.value)


def test_what_cannot_be_removed_does_not_end_a_run_that_is_saved(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    part = TrainingState({"model": {"w": whole(np.ones(3, np.float32))}}, 1)
    for step in (1, 2):
        (run_dir.unfinished(1) / "left").mkdir(parents=True, exist_ok=True)
        state = run_dir.begin_checkpoint(LoopState(step=step))
        write_part(part, run_dir.unfinished(step), 0, 1, state.save)
        run_dir.complete_checkpoint(state, count=1, keep=1, deadline_s=1.0)
    assert run_dir.saved_steps() == [2]


def test_a_journal_without_a_checkpoint_goes(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    (tmp_path / "journal.jsonl").write_text("{}\n")
    run_dir.rewind_records(run_dir.state())
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_part_that_does_not_come_is_named_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    part = TrainingState({"model": {"w": whole(np.ones(3, np.float32))}}, 1)
    for step, count in ((1, 1), (2, 3)):
        state = run_dir.begin_checkpoint(LoopState(step=step))
        write_part(part, run_dir.unfinished(step), 0, count, state.save)
        if count == 1:
            run_dir.complete_checkpoint(state, count, keep=1, deadline_s=1.0)
    with pytest.raises(NotSaved, match=r"step-000002.partial: no part of process 1, 2 after 0 s \(run.deadline_s\)"):
        run_dir.complete_checkpoint(state, count=3, keep=1, deadline_s=0.1)
    assert run_dir.state().step == 1


def test_an_average_that_a_finished_run_has_not_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = lowercase_run(tmp_path)
    train(run_file)
    assert train(run_file, "ema.decay=0.5", "evaluation.weights=ema").status == 1
    assert "error: evaluation.weights = ema: " in capsys.readouterr().err


def test_an_average_is_never_lost_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file, "ema.decay=0.5", "evaluation.weights=ema", "evaluation.at_ends=true").folder
    last = folder / "checkpoints" / "step-000004"
    average = load_file(last / "ema.safetensors")["table"]
    assert (average != load_file(last / "model.safetensors")["table"]).any()
    np.testing.assert_array_equal(load_file(folder / "export" / "model.safetensors")["table"], average.astype("f4"))
    before = unchanged(folder)
    capsys.readouterr()
    refused = train(run_file, "run.steps=6")
    assert (refused.status, refused.trainers) == (1, [])
    said = f"{last} has an average of the weights, which would be lost. Set it to go on with the average."
    assert said in capsys.readouterr().err
    assert unchanged(folder).keys() == before.keys()
    assert len(train(run_file, "run.steps=6", "ema.decay=0.9").metrics) == 6


def test_a_run_dir_that_is_no_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = lowercase_run(tmp_path)
    (tmp_path / "run").write_text("a file")
    assert train(run_file).status == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: run.dir = '{tmp_path / 'run'}' ({run_file}:1): cannot be used as a folder (")
    assert (tmp_path / "run").read_text() == "a file"


def test_records_outlive_removed_checkpoints(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path)
    folder = train(run_file).folder
    old = (folder / "rollouts.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    assert len(train(run_file).metrics) == 4
    assert (folder / "rollouts.jsonl.old").read_bytes() == old
    again = (folder / "rollouts.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    train(run_file)
    assert (folder / "rollouts.jsonl.old").read_bytes() == old
    assert (folder / "rollouts.jsonl.old2").read_bytes() == again


def test_a_folder_with_a_config_of_something_else_is_not_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = lowercase_run(tmp_path)
    other = tmp_path / "run" / "config.yaml"
    other.parent.mkdir()
    other.write_text("of: another program")
    assert train(run_file).status == 1
    assert "holds a config.yaml but no checkpoints folder" in capsys.readouterr().err
    assert other.read_text() == "of: another program"


def test_a_config_file_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path / "lr=3e-6")
    assert train(run_file).status == 0
