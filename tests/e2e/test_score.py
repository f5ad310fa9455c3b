"""`safework score` in processes of its own, with judges' models on both engines."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.runs import finish, read_lines, running, safework, to_go_on, wait_until
from tests.scoring import SAFETY, VERDICTS, answered, judged_run, unasked, write_answers
from tests.tiny import make_classifier

ENGINES = pytest.mark.parametrize("engine", ["torch", "jax"])


def done(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that ends well."""
    result = safework(*words)
    assert result.returncode == 0, result.stderr
    return result


def summary(out: Path) -> dict[str, Any]:
    return json.loads(out.with_suffix(".summary.json").read_text())


@torch.no_grad()
def probabilities(folder: Path, record: dict[str, Any]) -> np.ndarray:
    """What transformers gives for the classifier's three verdicts."""
    language = "zh" if "第" in record["prompt"] else "en"
    asked = SAFETY[language]["user"].replace("{query}", record["prompt"]).replace("{response}", record["response"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    return torch.softmax(model.score(model.model(ids).last_hidden_state[0, -1]), -1).numpy()


@ENGINES
def test_a_file_in_two_languages(tmp_path: Path, engine: str) -> None:
    run_file, out = judged_run(tmp_path, backend={"name": engine}), tmp_path / "scores.jsonl"
    records = [answered(number, "safety", verdict=list(VERDICTS)[number % 3]) for number in range(6)]
    records += [answered(number, "both", expected={"good": number / 5}) for number in range(6)]
    file = write_answers(tmp_path / "answers.jsonl", records)
    result = done("score", run_file, file, "--out", out)

    lines = read_lines(out)
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    judged = []
    for line, record in zip(lines, records, strict=True):
        expected = probabilities(tmp_path / "classifier", record)
        assert line["scores"]["safety"] == pytest.approx(expected @ list(VERDICTS.values()), abs=1e-4)
        assert line["verdicts"]["safety"] == list(VERDICTS)[expected.argmax()]
        assert line["judged_by"]["safety"].startswith(f"{tmp_path / 'classifier'}, weights ")
        assert line["asked"]["safety"]["latency_s"] > 0
        total = line["scores"]["safety"] + 0.5 * line["scores"].get("good", 0.0)
        assert line["total"] == pytest.approx(total)
        judged.append(line["verdicts"]["safety"])
    agreements = {(each["label"], each["verifier"]): each for each in summary(out)["agreements"]}
    right = [found == record["verdict"] for found, record in zip(judged[:6], records[:6], strict=True)]
    assert agreements["safety", "safety"]["accuracy"] == pytest.approx(np.mean(right))
    good = [line["scores"]["good"] for line in lines[6:]]
    wanted = [number / 5 for number in range(6)]
    assert agreements["both", "good"]["correlation"] == pytest.approx(np.corrcoef(good, wanted)[0, 1])
    for shown in ("12/12  ", "agreement with what the records expect", f"{out}: 12 records scored; "):
        assert shown in result.stdout
    assert "┃ label  ┃ verifier ┃ count ┃" in result.stdout


@ENGINES
def test_a_run_by_the_same_judge_and_by_another(tmp_path: Path, engine: str) -> None:
    # One row: what is computed side by side changes the last bits.
    run_file = judged_run(tmp_path, rows=1, backend={"name": engine}, run={"steps": 2})
    done("train", run_file)
    folder = tmp_path / "run"
    records = read_lines(folder / "rollouts.jsonl")
    done("score", folder / "config.yaml", folder)
    lines = read_lines(folder / "scores.jsonl")
    assert [line["scores"] for line in lines] == [record["scores"] for record in records]
    assert [line["verdicts"] for line in lines] == [record["verdicts"] for record in records]
    assert [line["total"] for line in lines] == [record["reward"] for record in records]
    [change] = summary(folder / "scores.jsonl")["changes"]
    assert (change["count"], change["largest_difference"], change["equal_verdicts"]) == (len(records), 0.0, 1.0)

    other = make_classifier(tmp_path / "other", num_hidden_layers=1, classes=3, seed=9)
    words = (f"servers.classifier.model={other}", "servers.classifier.rows=16")
    refused = safework("score", folder / "config.yaml", folder, *words)
    assert refused.returncode == 1
    assert f"error: --out {folder / 'scores.jsonl'}: its line 1 (" in refused.stderr
    assert "comes of other records or verifiers than those of now" in refused.stderr

    out = tmp_path / "other.jsonl"
    done("score", folder / "config.yaml", folder, "--out", out, *words)
    now, before = (np.array([line["scores"]["safety"] for line in each]) for each in (read_lines(out), records))
    [change] = summary(out)["changes"]
    assert change["largest_difference"] == pytest.approx(np.abs(now - before).max())
    assert 0 < change["mean_difference"] == pytest.approx(np.abs(now - before).mean())


@ENGINES
def test_a_killed_scoring_goes_on_to_the_same_file(tmp_path: Path, engine: str) -> None:
    run_file = judged_run(tmp_path, backend={"name": engine})
    file = write_answers(tmp_path / "answers.jsonl", [answered(number, "both") for number in range(1500)])
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    done("score", run_file, file, "--out", straight)
    words = ("score", str(file), str(killed), "", run_file)
    with running(f"safework_{engine}.main", *words) as process:
        wait_until(lambda: len(read_lines(killed)) >= 256, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = len(read_lines(killed))
    assert 256 <= kept < 1500
    result = done("score", run_file, file, "--out", killed)
    assert f"{killed}: {kept} of 1500 records are scored already" in result.stdout
    assert unasked(read_lines(killed)) == unasked(read_lines(straight))
    assert untimed(summary(killed)) == untimed(summary(straight))


def untimed(table: dict[str, Any]) -> dict[str, Any]:
    """A summary without latencies."""
    spreads = [{key: value for key, value in row.items() if "latency" not in key} for row in table["spreads"]]
    return {**table, "spreads": spreads}


def test_ctrl_c_keeps_the_chunk_and_says_how_to_go_on(tmp_path: Path) -> None:
    run_file, out = judged_run(tmp_path), tmp_path / "scores.jsonl"
    file = write_answers(tmp_path / "answers.jsonl", [answered(number, "both") for number in range(3000)])
    with running("common.cli", "score", run_file, file, "--out", out, "run.seed=5") as process:
        wait_until(lambda: len(read_lines(out)) >= 256, process)
        process.send_signal(signal.SIGINT)
        stopped = finish(process)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert "stopping after this chunk of records (Ctrl-C: at once, losing it)" in stopped.stderr
    words = to_go_on(stopped, f"stopped; the records scored so far are in {out}. ")
    assert words == ["score", str(run_file), "run.seed=5", str(file), "--out", str(out)]
    assert len(read_lines(out)) % 256 == 0
    assert not out.with_suffix(".summary.json").exists()
    done(*words)
    assert len(read_lines(out)) == 3000


# name: (words, what the error says; RUN, FILE and FOLDER stand for what they are)
MISTAKES = {
    "nothing to score": (["RUN"], "error: score got RUN. Give run files and, last, the file or run to score."),
    "no such file": (["RUN", "FOLDER/none.jsonl"], "error: FOLDER/none.jsonl: cannot be read (No such file"),
    "no run": (["RUN", "FOLDER"], "error: FOLDER: is not a run folder (no rollouts.jsonl). Give the run.dir of a run"),
    "no folder for the scores": (
        ["RUN", "FILE", "--out", "FOLDER/no/s.jsonl"],
        "error: --out FOLDER/no/s.jsonl: no such",
    ),
    "a folder for the scores": (
        ["RUN", "FILE", "--out", "FOLDER"],
        "error: FOLDER: could not be written (Is a directory)",
    ),
    "an override behind an option": (
        ["RUN", "FILE", "--label", "x", "rollout.rows=no"],
        "rollout.rows = 'no' (command",
    ),
    "a server that is down": (
        ["RUN", "FILE", "servers.classifier={engine: vllm, model: FOLDER/model, urls: ['http://127.0.0.1:9']}"],
        "error: server classifier: http://127.0.0.1:9/v1/models: ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path: Path, name: str) -> None:
    run_file = judged_run(tmp_path)
    file = write_answers(tmp_path / "answers.jsonl", [answered(1, "safety")])
    places = {"RUN": str(run_file), "FILE": str(file), "FOLDER": str(tmp_path)}
    words, said = MISTAKES[name]
    for place, path in places.items():
        words, said = [word.replace(place, path) for word in words], said.replace(place, path)
    result = safework("score", *words)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert said in result.stderr


def test_options_that_are_none(tmp_path: Path) -> None:
    result = safework("score", tmp_path, tmp_path, "--oot", "x")
    assert result.returncode == 2
    assert "unrecognized arguments: --oot x" in result.stderr
