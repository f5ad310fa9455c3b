"""The command on a tiny model: both engines train the same run, its export is a Hugging Face model with the logprobs
that were recorded, `check` needs no engine, and progress fits where it is shown: a terminal, a pipe, W&B.
"""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import ENVIRONMENT, TIMED, lowercase_run, read_lines, safework, saved_steps
from tests.training import ROOT


def two_engine_run(folder: Path, engine: str) -> Path:
    return lowercase_run(
        folder,
        run={"steps": 3},
        backend={"name": engine},
        loss={"old_logprobs": "recompute", "updates_per_rollout": 2, "kl_coef": 0.05},
        optimizer={"learning_rate": 1e-3},
        evaluation={"at_ends": True, "samples": 1},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the same run on each engine."""
    folders = {}
    for engine in ("torch", "jax"):
        run_file = two_engine_run(tmp_path_factory.mktemp(engine), engine)
        trained = safework("train", run_file)
        assert trained.returncode == 0, trained.stderr
        folders[engine] = run_file.parent / "run"
    return folders


def test_both_engines_draw_the_same_rollouts(runs: dict[str, Path]) -> None:
    torch_rollouts, jax_rollouts = (read_lines(folder / "rollouts.jsonl") for folder in runs.values())
    assert len(torch_rollouts) == 3 * 4 * 4
    for left, right in zip(torch_rollouts, jax_rollouts, strict=True):
        np.testing.assert_allclose(left.pop("logprobs"), right.pop("logprobs"), atol=1e-5)
        assert left.pop("advantage") == pytest.approx(right.pop("advantage"))
        assert left == right


def test_both_engines_record_the_same_metrics(runs: dict[str, Path]) -> None:
    for name, count in (("metrics.jsonl", 3), ("evaluation.jsonl", 2)):
        torch_records, jax_records = (read_lines(folder / name) for folder in runs.values())
        assert len(torch_records) == len(jax_records) == count
        for left, right in zip(torch_records, jax_records, strict=True):
            assert left.keys() == right.keys()
            if name == "metrics.jsonl":
                assert (left.pop("engine"), right.pop("engine")) == ("torch", "jax")
            for key, value in left.items():
                if not key.startswith(TIMED):
                    assert value == pytest.approx(right[key], rel=2e-5, abs=2e-7), key


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_an_export_is_a_hugging_face_model_with_the_logprobs_recorded(
    tmp_path: Path, runs: dict[str, Path], engine: str
) -> None:
    # The export of the checkpoint after step 2 is the policy that sampled step 2.
    assert saved_steps(runs[engine]) == [2, 3]
    exported = safework("export", runs[engine], "--step", "2", "--out", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout == f"{tmp_path / 'model'}: the policy after step 2, float32\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    rollouts = [record for record in read_lines(runs[engine] / "rollouts.jsonl") if record["step"] == 2]
    assert len(rollouts) == 16
    for record in rollouts:
        ids = torch.tensor([record["prompt_token_ids"] + record["token_ids"]])
        with torch.no_grad():
            log_all = model(ids).logits.log_softmax(-1)[0, :-1]
        found = log_all.gather(1, ids[0, 1:, None])[-len(record["token_ids"]) :, 0]
        np.testing.assert_allclose(found.numpy(), record["logprobs"], atol=2e-5)
        body = record["token_ids"][: -1 if record["finish_reason"] == "stop" else None]
        assert tokenizer.decode(body) == record["response"]


def test_the_run_exports_its_last_policy_by_itself(tmp_path: Path, runs: dict[str, Path]) -> None:
    assert safework("export", runs["torch"], "--out", tmp_path / "model").returncode == 0
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {path.name for path in (runs["torch"] / "export").iterdir()}
    for name in files:
        assert (tmp_path / "model" / name).read_bytes() == (runs["torch"] / "export" / name).read_bytes()


def test_bfloat16_export_halves_the_weights(tmp_path: Path, runs: dict[str, Path]) -> None:
    assert safework("export", runs["torch"], "--out", tmp_path / "half", "--dtype", "bfloat16").returncode == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    whole = AutoModelForCausalLM.from_pretrained(runs["torch"] / "export")
    assert model.dtype == torch.bfloat16
    for name, tensor in whole.named_parameters():
        assert torch.equal(model.get_parameter(name), tensor.to(torch.bfloat16))


def test_exporting_what_is_not_there_is_an_error(tmp_path: Path, runs: dict[str, Path]) -> None:
    nothing = safework("export", tmp_path)
    assert nothing.returncode == 1
    assert f"error: {tmp_path}: is not a run folder (no config.yaml). Give the run.dir of a run." in nothing.stderr
    (tmp_path / "config.yaml").write_text("of: another program")
    foreign = safework("export", tmp_path)
    assert f"error: {tmp_path}: is not a run folder (no checkpoints)." in foreign.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    (tmp_path / "checkpoints").mkdir()
    assert f"error: {tmp_path}: no checkpoint is complete yet." in safework("export", tmp_path).stderr
    rotated = safework("export", runs["torch"], "--step", "1")
    assert rotated.returncode == 1
    assert "no checkpoint of step 1; complete are: [2, 3]." in rotated.stderr


def test_check_prints_origins_and_needs_no_engine(tmp_path: Path) -> None:
    run_file = two_engine_run(tmp_path, "torch")
    # A module that is None in sys.modules cannot be found or imported, as on a machine that lacks it.
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'jax', 'flax', 'optax')))\n"
        "from common.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [
        sys.executable,
        "-c",
        program,
        "check",
        str(run_file),
        "rollout.group_size=8",
        "model.frozen=[model.embed_tokens.weight]",
    ]
    checked = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "group_size: 8 # command line" in checked.stdout
    assert f"prompts_per_step: 4 # {run_file}:1" in checked.stdout
    assert f"rule: instructions # {ROOT / 'configs' / 'recipe' / 'rules.yaml'}:" in checked.stdout
    assert "temperature: 1.0 # default" in checked.stdout
    assert "# frozen: 1 of 12 tensors, 30.2% of the weights\n" in checked.stdout
    assert "12 prompts an epoch, 12 held out, labels: instruction_rule; ready to train" in checked.stdout
    assert not (tmp_path / "run").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    trained = safework("train", two_engine_run(tmp_path, "torch"))
    assert trained.returncode == 0
    assert "\x1b" not in trained.stdout + trained.stderr
    lines = trained.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    assert all(" left 0" in line for line in lines if line.startswith("step "))
    assert [line for line in lines if line.startswith("held-out after step ")]
    # A sample of the first step: prompt, response, score.
    assert any(line.startswith("-> ") for line in lines)
    assert any(re.fullmatch(r"\[instruction_rule: \d\.\d\d \(instructions \d\.\d\d\)\]", line) for line in lines)
    assert lines[-1].startswith("done: ")


def read_terminal(run_file: Path) -> str:
    """All that a run shows on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, **ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "50"}
    words = [sys.executable, "-m", "common.cli", "train", str(run_file)]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError as error:  # how Linux says that the other side has closed
        assert error.errno == errno.EIO
    finally:
        os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_progress_with_time_left_on_a_terminal(tmp_path: Path) -> None:
    shown = read_terminal(two_engine_run(tmp_path, "torch"))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "\x1b[" in shown
    # The bar, steps done, time so far and time left.
    assert re.search(r"steps .*3/3 \d:\d\d:\d\d \d:\d\d:\d\d", plain)
    # A table a step, and a sample.
    assert all(f"step {step}" in plain for step in (1, 2, 3))
    assert "a sample" in plain
    for column in ("reward", "entropy", "grad norm", "reward/instructions"):
        assert column in plain


def test_wandb_offline_mirrors_the_metrics(tmp_path: Path) -> None:
    run_file = two_engine_run(tmp_path, "torch")
    trained = safework("train", run_file, "metrics.wandb=offline", WANDB_API_KEY="", WANDB_SILENT="true")
    assert trained.returncode == 0, trained.stderr
    [record] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    kept = record.read_bytes()
    for key in (b"reward/mean", b"policy/entropy", b"heldout/reward/mean"):
        assert key in kept


def test_wandb_online_without_a_key_is_an_error(tmp_path: Path) -> None:
    run_file = two_engine_run(tmp_path, "torch")
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    failed = safework("train", run_file, "metrics.wandb=online", **home)
    assert failed.returncode == 1
    assert "error: metrics.wandb = 'online': W&B could not be opened (" in failed.stderr
    assert "Set WANDB_API_KEY in the environment, or metrics.wandb to offline or off." in failed.stderr
    assert "Traceback" not in failed.stderr
