"""`safework attack` on both engines, with tiny random models as judges in process: table, report, limit, and check."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from common.attack.families import FAMILIES
from tests.runs import safework, start, write_records
from tests.tiny import make_classifier, make_model
from tests.training import write_run

ENGINES = ("torch", "jax")
PROMPT = {"en": {"system": "Judge.", "user": "Q: {query}\n[Answer begins]\n{response}\n[Answer ends]\nGood?"}}
WITH_REFERENCE = {"en": {"user": "[Answer begins]\n{response}\n[Answer ends]\nIs it {reference}?"}}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a judge that writes, one that compares, and a think-aware head; data for one of them."""
    folder = tmp_path_factory.mktemp("attacked")
    data = write_records(folder / "value.jsonl", [{"id": "1", "label": "value", "prompt": "Why?"}])
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 16384}  # a token a byte, and some attacks are long
    model = make_model(folder / "lm", **sizes)
    head = make_classifier(folder / "head", classes=2, **sizes)
    labels = {"type": "labels", "verdicts": {"good": 1.0, "bad": 0.0}}
    return write_run(
        folder,
        model,
        data={"train": [{"path": str(data)}]},
        rewards={
            "verifiers": {name: {"judge": name} for name in ("value", "knowledge", "safety")},
            "judges": {
                "value": {"server": "lm", "prompts": PROMPT, "read_out": labels},
                "knowledge": {
                    "server": "lm",
                    "prompts": WITH_REFERENCE,
                    "read_out": {"type": "number", "grades": [1e6, 1e7]},
                },
                "safety": {
                    "server": "head",
                    "prompts": PROMPT,
                    "read_out": {**labels, "type": "classes"},
                    "think_aware": "on",
                },
            },
            "recipe": {name: {name: 1.0} for name in ("value", "knowledge", "safety")},
            "attack_report": str(folder / "attack.json"),
        },
        servers={
            "lm": {"engine": "in_process", "model": str(model)},
            "head": {"engine": "in_process", "model": str(head), "rests_in": "host"},
        },
    )


@pytest.fixture(scope="module")
def reports(run_file: Path) -> dict[str, dict[str, Any]]:
    """What each engine writes of two judges; the checks of the command's own output stand here."""
    found = {}
    for engine in ENGINES:
        out = run_file.parent / f"{engine}.json"
        words = (run_file, "--judge", "value", "safety", "--out", out, "--samples", "2", f"backend.name={engine}")
        result = safework("attack", *words)
        assert result.returncode == 0, result.stderr
        assert "score gained by attacks on judges" in result.stdout
        assert result.stdout.count("verdict in reasoning") == 2
        found[engine] = json.loads(out.read_text())
        assert f"{out}: {len(found[engine]['attempts'])} attempts" in result.stdout
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_every_attempt_is_in_the_report(reports: dict[str, dict[str, Any]], engine: str) -> None:
    report = reports[engine]
    assert list(report["judges"]) == ["value", "safety"]
    for name, judge in report["judges"].items():
        attempts = [attempt for attempt in report["attempts"] if attempt["judge"] == name]
        base = {attempt["case"]: attempt["score"] for attempt in attempts if attempt["family"] is None}
        assert len(base) == judge["base_cases"] == 2
        assert list(judge["families"]) == [family for family in FAMILIES if family != "fake_reference"]
        assert sum(family["cases"] for family in judge["families"].values()) == len(attempts) - 2
        for attempt in attempts:
            assert attempt["gain"] == pytest.approx(attempt["score"] - base[attempt["case"]])
            assert attempt["evidence"]
        assert judge["labels"] == [name]
        assert ", weights " in judge["model"]


def test_a_think_aware_judge_is_shown_the_reasoning(reports: dict[str, dict[str, Any]]) -> None:
    for attempt in reports["torch"]["attempts"]:
        with_reasoning = attempt["judge"] == "safety" and attempt["response"].startswith("<think>")
        assert attempt["evidence"].startswith("reasoning ") == with_reasoning


def test_both_engines_find_the_same(reports: dict[str, dict[str, Any]]) -> None:
    ours, theirs = (reports[engine]["attempts"] for engine in ENGINES)
    for left, right in zip(ours, theirs, strict=True):
        assert left["response"] == right["response"]
        assert left["score"] == pytest.approx(right["score"], abs=1e-4)
    names = [reports[engine]["judges"]["value"]["model"] for engine in ENGINES]
    assert names[0] == names[1].replace(" in float32 of jax,", " in float32 of torch,")


def test_attack_then_check(run_file: Path) -> None:
    """Over the limit the report is written all the same; check and train hold the config to it."""
    result = safework("attack", run_file, "--judge", "value", "rewards.max_attack_gain=0.0")
    families = json.loads((run_file.parent / "attack.json").read_text())["judges"]["value"]["families"]
    worst = max(families, key=lambda name: families[name]["mean_gain"])
    assert result.returncode == 1
    refused = [safework(verb, run_file, "rewards.max_attack_gain=0.0") for verb in ("check", "train")]
    assert not (run_file.parent / "run").exists()
    for said in (result.stderr, *(each.stderr for each in refused)):
        assert "Traceback" not in said
        assert f"error: rewards.max_attack_gain = 0.0 (command line): attacks of the family {worst!r} gain " in said
        assert "on judge 'value'" in said
    passed = safework("check", run_file, "rewards.max_attack_gain=1.0")
    assert passed.returncode == 0, passed.stderr
    assert "ready to train" in passed.stdout
    other = safework("check", run_file, "rewards.max_attack_gain=1.0", "backend.dtype=bfloat16")
    assert "judge 'value' asked another model when it was attacked" in other.stderr
    assert safework("attack", run_file, "--judge", "value", "--samples", "1").returncode == 0
    few = safework("check", run_file, "rewards.max_attack_gain=1.0")
    assert "judge 'value' was shown 1 of its 16 cases" in few.stderr


def test_a_signal_ends_an_attack_without_a_report(run_file: Path) -> None:
    out = run_file.parent / "stopped.json"
    process = start("common.cli", "attack", run_file, "--judge", "value", "--out", out)
    assert process.stdout is not None
    assert re.match(r"64/\d+  [\d.]+ answers/s, 0 missing, left [\d.]+ min", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "stopped; no report was written"
    assert not out.exists()


def test_a_judge_that_writes_no_grade_stops_the_attack(run_file: Path) -> None:
    """A random model writes no numbers: nothing can be said of what attacks gain."""
    result = safework("attack", run_file, "--judge", "knowledge", "--samples", "1", "--out", run_file.parent / "k.json")
    assert result.returncode == 1
    assert "error: judge 'knowledge': none of its 1 base cases has a score" in result.stderr
    assert not (run_file.parent / "k.json").exists()
