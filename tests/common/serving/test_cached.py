"""The same question to the same model is asked once; everything that could change the answer is part of the key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.serving.answer_cache import AnswerCache
from common.serving.cached import CachedModel
from common.serving.model import Answer, Image, Question
from common.types import Asked, Missing


class Counting:
    """Answers with how often it was asked; `lost` questions get none."""

    def __init__(self, identity: str = "judge", lost: tuple[str, ...] = ()) -> None:
        self.identity, self._lost, self.asked = identity, lost, 0

    def generate(self, questions: Sequence[Question], max_tokens: int) -> list[Answer[str]]:
        return [self._answer(question, f"答 {self.asked} {max_tokens}") for question in questions]

    def label_logprobs(self, questions: Sequence[Question], labels: Sequence[str]) -> list[Answer[np.ndarray]]:
        return [self._answer(question, np.full(len(labels), self.asked, np.float32)) for question in questions]

    def head(self, questions: Sequence[Question]) -> list[Answer[np.ndarray]]:
        return [self._answer(question, np.float32([self.asked, 0.1])) for question in questions]

    def close(self) -> None: ...

    def _answer(self, question: Question, value: object) -> Answer:
        self.asked += 1
        lost = question.user[0] in self._lost
        return Answer(Missing("lost") if lost else value, Asked(self.identity, 0.0, 1.0, cached=False))  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    with closing(AnswerCache(tmp_path / "answers.sqlite")) as opened:
        yield opened


def question(text: str, system: str | None = None) -> Question:
    return Question(system, (text,))


def test_a_second_run_asks_nothing(cache: AnswerCache) -> None:
    questions = [question("a"), question("b")]
    first = CachedModel(Counting(), cache)
    asked = first.generate(questions, 4), first.label_logprobs(questions, ["x", "y"]), first.head(questions)
    silent = Counting()
    second = CachedModel(silent, cache)
    again = second.generate(questions, 4), second.label_logprobs(questions, ["x", "y"]), second.head(questions)
    assert silent.asked == 0
    for before, now in zip(asked, again, strict=True):
        for old, new in zip(before, now, strict=True):
            np.testing.assert_array_equal(old.value, new.value)
            assert (old.asked.cached, new.asked.cached) == (False, True)
            assert new.asked == Asked("judge", 0.0, 0.0, cached=True)


def test_equal_questions_of_a_batch_are_asked_once(cache: AnswerCache) -> None:
    counting = Counting()
    answers = CachedModel(counting, cache).head([question("a"), question("b"), question("a")])
    assert counting.asked == 2
    np.testing.assert_array_equal(answers[0].value, answers[2].value)
    assert [answer.asked.cached for answer in answers] == [False, False, True]


def test_what_is_missing_is_asked_again(cache: AnswerCache) -> None:
    assert isinstance(CachedModel(Counting(lost=("a",)), cache).head([question("a")])[0].value, Missing)
    (answer,) = CachedModel(Counting(), cache).head([question("a")])
    assert not isinstance(answer.value, Missing)
    assert not answer.asked.cached


def test_outputs_that_are_no_numbers_are_asked_again(cache: AnswerCache) -> None:
    counting = Counting()
    counting.asked = float("nan")  # type: ignore[assignment]
    (answer,) = CachedModel(counting, cache).head([question("a")])
    assert np.isnan(answer.value[0])  # type: ignore[index]
    (answer,) = CachedModel(Counting(), cache).head([question("a")])
    assert not answer.asked.cached


def test_an_image_on_the_web_may_change_and_is_asked_about_again(cache: AnswerCache) -> None:
    counting = Counting()
    model = CachedModel(counting, cache)
    for source in ("https://host/a.png", "http://host/a.png", "data:image/png;base64,AAAA"):
        for _ in range(2):
            model.generate([Question(None, ("a", Image(source)))], 4)
    assert counting.asked == 2 + 2 + 1


def test_everything_that_changes_an_answer_is_in_its_key(cache: AnswerCache, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    counting, other = Counting(), Counting("another judge")
    pictured = Question(None, ("a", Image(str(image))))
    models = [CachedModel(model, cache) for model in (counting, other)]
    for model in models:
        model.generate([question("a"), question("a", "s"), question("b"), Question(None, ("a", "b")), pictured], 4)
        model.generate([question("a")], 5)
        model.label_logprobs([question("a")], ["x", "y"])
        model.label_logprobs([question("a")], ["y", "x"])
        model.head([question("a")])
    assert (counting.asked, other.asked) == (9, 9)
    image.write_bytes(b"two")
    models[0].generate([pictured], 4)
    assert counting.asked == 10
    image.write_bytes(b"one")
    models[0].generate([pictured], 4)
    assert counting.asked == 10
