"""The form of a response: think block, then answer."""

import pytest

from common.rewards.rules import TaskFormat, ThinkFormat
from common.rewards.rules.format import is_blank
from common.types import Score
from tests.common.rewards.samples import sample


def value(rule: ThinkFormat | TaskFormat, text: str) -> float:
    (score,) = rule.score([sample(text)])
    assert isinstance(score, Score) and score.evidence
    return score.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>2 + 2</think>4", 1),
        ("  <think>\n2 + 2\n</think>\n\n4\n", 1),
        ("2 + 2</think>4", 1),  # the chat template already opened the block
        ("<think>先算二加二</think>四", 1),
        ("<think>smile</think>🙂", 1),
        ("4", 0),
        ("", 0),
        ("<think></think>4", 0),
        ("<think> \n </think>4", 0),
        ("<think>2 + 2</think>", 0),
        ("<think>2 + 2</think> \n", 0),
        ("<think>2 + 2</think>\u200b\u2060", 0),
        ("<think>2 + 2", 0),
        ("<think>a<think>b</think>c</think>4", 0),
        ("<think>a</think>4<think>b</think>", 0),
        ("<think>a</think></think>4", 0),
        ("<think><think>a</think>4", 0),
        ("Sure: <think>a</think>4", 0),
        ("</think>4", 0),
    ],
)
def test_think_format(text: str, expected: int) -> None:
    assert value(ThinkFormat(), text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think>2 + 2</think>\boxed{4}", 1),
        (r"<think>2 + 2</think>So it is $\boxed{4}$.", 1),
        (r"<think>\boxed{4}</think>\boxed{4}", 0),
        (r"<think>2 + 2</think>4", 0),
        (r"\boxed{4}", 0),
        (r"<think>2 + 2 \boxed{4}", 0),
    ],
)
def test_task_format(text: str, expected: int) -> None:
    assert value(TaskFormat(), text) == expected


def test_format_looks_at_the_response_alone() -> None:
    """Upstream defect 1: the example in the system prompt matched, so the format reward was always 1."""
    plain = sample("4")
    assert "<think>" in plain.prompt.messages[0].content
    assert ThinkFormat().score([plain]) == [Score(0.0, "no closed think block")]


def test_a_truncated_response_keeps_its_form_only_if_the_answer_began() -> None:
    cut = [sample(text, finish_reason="length") for text in ("<think>a</think>It is", "<think>a and then")]
    assert [score.value for score in ThinkFormat().score(cut) if isinstance(score, Score)] == [1, 0]


def test_one_result_per_sample_in_order() -> None:
    scores = ThinkFormat().score([sample("x"), sample("<think>a</think>b"), sample("")])
    assert [score.value for score in scores if isinstance(score, Score)] == [0, 1, 0]


def test_zero_width_text_is_blank() -> None:
    assert is_blank("\u200b \n") and is_blank("") and not is_blank(".")
