"""Verifiers of the user's own: found by name, called with samples, and never the source of a number that is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from common.rewards.custom import custom_reward_model, custom_rule
from common.types import Missing, Score
from tests.common.rewards.samples import sample

OWN = "tests.common.rewards.own_verifiers"


def origin(key: str) -> str:
    return f"place of {key}"


def rule(name: str, **options: Any) -> Any:
    return custom_rule("mine", f"{OWN}:{name}", options, "rewards.verifiers.mine", origin)


def reward_model(name: str, **options: Any) -> Any:
    return custom_reward_model("mine", f"{OWN}:{name}", options, "rewards.verifiers.mine", origin)


def test_a_function_scores_each_sample_with_the_options() -> None:
    samples = [sample("HELLO"), sample("Hello"), sample("hello")]
    assert [score.value for score in rule("shouts").score(samples)] == [1.0, 1.0, 0.0]
    assert [score.value for score in rule("shouts", limit=1).score(samples)] == [1.0, 0.0, 0.0]


def test_a_class_is_made_once_and_called_with_all() -> None:
    assert reward_model("LengthRM", scale=0.5).score([sample("four"), sample("")]) == [Score(2.0, "2"), Score(0.0, "0")]


@pytest.mark.parametrize("text", ["none", "nan", "text", "bad score", "missing", "digits", "score of digits"])
def test_what_is_no_number_is_missing(text: str) -> None:
    (found,) = rule("odd").score([sample(text)])
    assert isinstance(found, Missing)


def test_scores_with_evidence_and_truth_values_are_numbers() -> None:
    assert rule("odd").score([sample("score"), sample("true")]) == [Score(0.25, "a quarter"), Score(1.0, "1")]


def test_scores_are_plain_numbers_that_can_be_written() -> None:
    (found,) = rule("odd").score([sample("numpy")])
    assert isinstance(found, Score) and type(found.value) is float


def test_options_that_the_function_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"^rewards.verifiers.mine.options = .*does not take them"):
        rule("shouts", limt=1)


def test_too_few_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"verifier 'mine' gave 1 scores for 2 samples"):
        reward_model("OneShort", scale=1).score([sample("a"), sample("b")])


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.at.all:f", "cannot be imported"),
        (f"{OWN}:missing_one", "has no 'missing_one'"),
        (":f", "names no module"),
        (".own:f", "names no module"),
        (f"{OWN}:__doc__", "is not a callable object. Name a function"),
        ("builtins:max", "no signature found for builtin <built-in function max>. Name a function"),
    ],
)
def test_names_that_lead_nowhere(path: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        custom_rule("mine", path, {}, "rewards.verifiers.mine", origin)
    assert str(caught.value).startswith(
        f"rewards.verifiers.mine.rule = {path!r} (place of rewards.verifiers.mine.rule)"
    )
    assert problem in str(caught.value)


def test_options_that_the_class_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"^rewards.verifiers.mine.options = .*cannot be made with them"):
        reward_model("LengthRM", size=1)


def test_modules_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "written_by_a_user.py").write_text("def half(sample):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = custom_rule("mine", "written_by_a_user:half", {}, "rewards.verifiers.mine", origin)
    assert made.score([sample("x")]) == [Score(0.5, "0.5")]
