"""Judges that look at the reasoning: what they pay for it, what they only measure, and what check says of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from common.config.checks import warnings
from common.config.judging import JudgeSection, PromptSection, ReadOutSection
from common.config.load import load_config
from common.rewards.judges.judge import Judge
from common.rewards.tally import tally
from common.serving.model import Answer, Question
from common.types import Asked, Missing, Score
from tests.common.rewards.samples import sample
from tests.training import ROOT, write_run


class Scale:
    """Writes the number that a text ends with; nothing for a text that ends with a question mark."""

    identity = "scale"

    def generate(self, questions: Sequence[Question], max_tokens: int) -> list[Answer[str]]:
        texts = [str(question.user[0]) for question in questions]
        asked = Asked("scale", 0.0, 1.0, cached=False)
        return [Answer(Missing("no idea") if text.endswith("?") else text.split()[-1], asked) for text in texts]


GRADES = (0.2, 0.25, 0.5, 0.8, 1.0)


def judge(think_aware: object, grades: Sequence[float] = GRADES) -> Judge:
    section = JudgeSection.model_validate(
        {
            "server": "s",
            "prompts": {"en": PromptSection(user="A: {response}")},
            "read_out": {"type": "number", "grades": [*grades]},
            "think_aware": think_aware,
        }
    )
    return Judge("safety", section, Scale())  # type: ignore[arg-type]


SAMPLES = [sample("<think>plan 0.5</think>answer 0.8"), sample("answer 0.25")]


@pytest.mark.parametrize(
    ("think_aware", "values", "apart"),
    [
        ("off", [0.8, 0.25], [None, None]),
        (False, [0.8, 0.25], [None, None]),
        ("measure", [0.8, 0.25], [0.3, None]),
        ("on", [0.4, 0.25], [0.3, None]),
        (True, [0.4, 0.25], [0.3, None]),
    ],
)
def test_reasoning_is_ignored_measured_or_paid_for(
    think_aware: object, values: list[float], apart: list[float | None]
) -> None:
    scores = judge(think_aware).score(SAMPLES)
    assert all(isinstance(score, Score) for score in scores)
    assert [score.value for score in scores] == pytest.approx(values)  # type: ignore[union-attr]
    for score, expected in zip(scores, apart, strict=True):
        assert score.disagreement == (None if expected is None else pytest.approx(expected))  # type: ignore[union-attr]
    metrics = tally(scores).metrics("safety")
    assert metrics.get("disagreement/safety") == (None if apart[0] is None else pytest.approx(0.3))


def test_a_missing_half_is_a_missing_score() -> None:
    found = judge("on").score([sample("<think>what?</think>answer 1"), sample("<think>plan 1</think>what?")])
    assert [isinstance(result, Missing) for result in found] == [True, True]


def test_an_empty_answer_has_the_lowest_score_and_nobody_is_asked() -> None:
    (found,) = judge("off", (-1.0, -0.5, 1.0)).score([sample("  ")])
    assert found == Score(-1.0, "empty response")
    (found,) = judge("on").score([sample("<think>plan 1</think>  ")])
    assert isinstance(found, Score) and found.value == 0.2


def test_a_scalar_head_has_no_lowest_score_and_is_asked_about_an_empty_answer() -> None:
    class Head:
        def head(self, questions: Sequence[Question]) -> list[Answer[np.ndarray]]:
            asked = Asked("head", 0.0, 1.0, cached=False)
            return [Answer(np.float32([-len(question.user[0])]), asked) for question in questions]

    section = judge("off").section.model_copy(update={"read_out": ReadOutSection(type="scalar")})
    (found,) = Judge("value", section, Head()).score([sample(" ")])  # type: ignore[arg-type]
    assert isinstance(found, Score) and found.value == -len("A: ")


@pytest.mark.parametrize("read_out", [{"type": "scalar"}, {"type": "number", "grades": [-1.0, 1.0]}])
def test_products_of_scores_that_may_be_negative_are_refused(read_out: dict[str, object]) -> None:
    table = {"server": "s", "prompts": {"en": {"user": "{response}"}}, "read_out": read_out}
    JudgeSection.model_validate(table | {"think_aware": "measure"})
    with pytest.raises(ValidationError, match="two negative ones would become a good one"):
        JudgeSection.model_validate(table | {"think_aware": "on"})


def test_check_warns_of_it(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    run = write_run(folder, folder)
    shipped = [run, ROOT / "configs" / "judge" / "safety.yaml"]
    assert list(warnings(load_config(shipped).config)) == []
    (warning,) = warnings(load_config(shipped, ["rewards.judges.safety.think_aware=on"]).config)
    assert warning.startswith("rewards.judges.safety.think_aware is on: ")
