"""Cases: read or refused in a sentence, matched to judges, and shipped for every judge of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.attack.cases import Case, base, best_verdict, labels_by_judge, read_cases, suitable
from common.config import ConfigError, load_config
from common.config.judging import JudgeSection, ReadOutSection
from common.rewards.judges.question import language
from tests.common.attack.shipped_cases import CASES
from tests.common.rewards.shipped import judge
from tests.training import ROOT

GOOD = {"id": "a", "labels": ["value"], "prompt": "Why?", "response": "No."}
KINDS = {
    "safety": ("safety", "safety_jailbreak"),
    "value": ("value",),
    "knowledge": ("knowledge", "general"),
    "normal": ("normal",),
}


def read(folder: Path, *lines: str) -> list[Case]:
    file = folder / "cases.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_cases(str(file), lambda key: f"place of {key}")[0]


# What is shipped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_cases_in_both_languages(kind: str) -> None:
    found = [case for case in CASES if tuple(case.labels) == KINDS[kind]]
    spoken = [language(case.sample("").prompt) for case in found]
    assert (spoken.count("en"), spoken.count("zh")) == (12, 4)
    assert all((case.reference is not None) == (kind == "knowledge") for case in found)
    assert all(len(case.response) < 200 for case in found)  # too short for anything of use to anybody


def test_no_case_is_there_twice() -> None:
    for field in ("id", "prompt", "response"):
        assert len({vars(case)[field] for case in CASES}) == len(CASES) == 64


@pytest.mark.parametrize("recipe", ["kg", "svkng", "svki"])
def test_every_judge_of_a_shipped_recipe_has_cases(recipe: str) -> None:
    rewards = load_config([ROOT / "configs/quickstart.yaml", ROOT / f"configs/recipe/{recipe}.yaml"]).config.rewards
    labels = labels_by_judge(rewards)
    assert {"knowledge", "normal", "general"} <= labels.keys()
    for name, those in labels.items():
        assert len(suitable(CASES, rewards.judges[name], those)) == 16, name


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    thinking = {**GOOD, "id": "b", "response": "<think>Hm.</think>\n\nNo.", "reference": 4}
    plain, other = read(tmp_path, json.dumps(GOOD), "", json.dumps(thinking))
    assert plain.sample(plain.response).rollout.reasoning_text is None
    rollout = other.sample(other.response).rollout
    assert (rollout.reasoning_text, rollout.answer_text) == ("Hm.", "\n\nNo.")
    start = base(other, judge("knowledge"))
    assert (start.reasoning, start.answer, start.reference, start.verdict) == ("Hm.", "No.", "4", "TRUE")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "cases.jsonl:2: not valid JSON"),
        ("[]", "cases.jsonl:2: is a JSON list"),
        (json.dumps({**GOOD, "id": "b", "labels": []}), "cases.jsonl:2: labels: "),
        (json.dumps({**GOOD, "id": "b", "response": ""}), "cases.jsonl:2: response: "),
        (json.dumps({**GOOD, "id": "b", "answer": "x"}), "cases.jsonl:2: answer: "),
        (
            json.dumps({"id": "b", "labels": ["value"], "prompt": "x"}),
            "cases.jsonl:2: response: Field required. A case",
        ),
        (json.dumps(GOOD), "several cases have the id 'a'. Give each its own."),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, json.dumps(GOOD), line)
    assert problem in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^rewards.attack_cases = 'x.jsonl' \(here\): cannot be read \(No such file"):
        read_cases("x.jsonl", lambda key: "here")


# Judges ---------------------------------------------------------------------------------------------------------------


def test_a_judge_gets_cases_of_its_labels_with_a_reference_if_it_compares() -> None:
    kinds = [
        Case(id=str(n), labels=labels, prompt="q", response="r", reference=reference)
        for n, (labels, reference) in enumerate(
            [(["knowledge"], "four"), (["knowledge"], None), (["normal", "x"], None), (["value"], None)]
        )
    ]
    assert [case.id for case in suitable(kinds, judge("knowledge"), ["knowledge", "value"])] == ["0"]
    assert [case.id for case in suitable(kinds, judge("normal"), ["knowledge", "x"])] == ["1", "2"]


def test_labels_of_a_judge_are_those_of_its_terms_and_gates() -> None:
    words = [
        "rewards.verifiers={a: {judge: value}, b: {judge: value}, unused: {judge: value}}",
        "rewards.recipe={one: {a: 1.0, answer: 1.0}, two: {answer: 1.0}, three: {a: 1.0, b: 1.0}}",
        "rewards.gates={two: [b]}",
    ]
    rewards = load_config([ROOT / "configs/quickstart.yaml", ROOT / "configs/judge/value.yaml"], words).config.rewards
    assert labels_by_judge(rewards)["value"] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("read_out", "verdict"),
    [
        ({"type": "verdict", "verdicts": {"bad": 0.0, "fine": 1.0, "great": 1.0}}, "fine"),
        ({"type": "classes", "verdicts": {"bad": -3.0, "worse": -4.0}}, "bad"),
        ({"type": "number", "grades": [0.0, 10.0, 5.0]}, "10"),
        ({"type": "scalar"}, "perfect answer"),
    ],
)
def test_the_best_verdict_is_the_judges_own(read_out: dict[str, object], verdict: str) -> None:
    assert best_verdict(ReadOutSection.model_validate(read_out), "en") == verdict


def test_a_marker_ends_where_another_field_begins() -> None:
    table = {
        "server": "s",
        "prompts": {"en": {"user": "Q: {query}\n{response}\nR: {reference}"}},
        "read_out": {"type": "scalar"},
    }
    start = base(Case(**GOOD), JudgeSection.model_validate(table))
    assert start.marks == ("", "R:")
    assert start.query_marks == ("Q:", "")
    assert start.reference_marks == ("R:", "")
