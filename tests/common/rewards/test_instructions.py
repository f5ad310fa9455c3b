"""The instruction-following rule: which share of the constraints an answer meets."""

import pytest

from common.rewards.rules import RULES, Instructions
from common.rewards.rules.instructions import Mode
from common.types import Score
from tests.common.rewards.samples import prompt, sample

REFERENCE = [
    ["Length", "Words", "at most 3 words"],
    ["Content", "Keywords", "must include the keyword 'blue'"],
    ["Language", "English", "all lowercase"],
    ["Content", "Punctuation", "end with a period"],
]


def value(text: str, reference: object = REFERENCE, mode: Mode = "share") -> float:
    (score,) = Instructions(mode).score([sample(text, reference)])
    assert isinstance(score, Score)
    return score.value


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("it is blue.", 1),
        ("<think>Blue, of course, is the only colour.</think>it is blue.", 1),
        ("<think>it is blue.</think>It Is Red!", 0.25),
        ("It is blue.", 0.75),
        ("it is blue", 0.75),
        ("", 0),
        (" \u200b\n", 0),
        ("<think>it is blue.</think>", 0),
        ("<think>it is blue.", 0),
    ],
)
def test_share(text: str, share: float) -> None:
    assert value(text) == share


def test_modes() -> None:
    assert [value("It is blue.", mode=mode) for mode in ("share", "count", "all")] == [0.75, 3, 0]
    assert [value("it is blue.", mode=mode) for mode in ("share", "count", "all")] == [1, 4, 1]
    with pytest.raises(ValueError, match=r'instructions\.mode = "some"'):
        Instructions(mode="some")  # type: ignore[arg-type]


def test_one_constraint_scores_as_one() -> None:
    assert value("一二三", [["Length", "Words", "不超过3字"]]) == 1
    assert value("一二三四", [["Length", "Words", "不超过3字"]], mode="count") == 0


def test_evidence_names_met_and_missed() -> None:
    (score,) = Instructions().score([sample("It is blue.", REFERENCE)])
    assert isinstance(score, Score)
    assert score.evidence == (
        "met: at most 3 words; must include the keyword 'blue'; end with a period | missed: all lowercase"
    )


def test_a_truncated_answer_is_judged_as_it_stands() -> None:
    (score,) = Instructions().score([sample("<think>a</think>it is", REFERENCE, finish_reason="length")])
    assert isinstance(score, Score) and score.value == 0.5


def test_references_are_checked_at_load() -> None:
    Instructions().check_reference(prompt(REFERENCE))
    with pytest.raises(
        ValueError, match=r'Length/Words: the statement "be brief" is not understood; .*between 5 and 10'
    ):
        Instructions().check_reference(prompt([["Length", "Words", "be brief"]]))
    with pytest.raises(ValueError, match="must be a list"):
        Instructions().check_reference(prompt(["Length", "Words", "at most 3 words"]))


def test_rules_by_name() -> None:
    assert set(RULES) == {"think_format", "task_format", "answer", "instructions", "overlong", "language"}
    for name, rule in RULES.items():
        built = rule(max_length=2048) if name == "overlong" else rule()
        built.close()
        assert built.name == name and len(built.score([])) == 0
