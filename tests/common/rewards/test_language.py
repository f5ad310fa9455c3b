"""Language consistency between question and response."""

from dataclasses import replace

import pytest

from common.rewards.rules import LanguageConsistency
from common.rewards.rules.measures import language
from common.types import Message, Score
from tests.common.rewards.samples import prompt, sample

ENGLISH, CHINESE = "How does a plane stay in the air?", "飞机为什么能停留在空中？"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "English"),
        (CHINESE, "Chinese"),
        ("Comment ça va, mon élève ?", "English"),  # any Latin script
        ("我们使用 Transformer 模型和 attention 机制来处理这个问题", "Chinese"),
        ("The word 你好 means hello in Chinese", "English"),
        ("你好 hello world", "mixed"),
        ("Как дела сегодня", "other"),
        ("こんにちは", "other"),
        ("안녕하세요", "other"),
        ("12 + 3 = 15", None),
        ("", None),
        ("```python\nprint('hello world')\n```\n这是代码", "Chinese"),
        (r"因为 $x^2 + abc = def$ 所以 \[ \text{velocity} = a \] 成立", "Chinese"),
        ("请看 https://example.com/some/long/path 这里", "Chinese"),
    ],
)
def test_language_of_a_text(text: str, expected: str | None) -> None:
    assert language(text) == expected


@pytest.mark.parametrize(
    ("question", "response", "expected"),
    [
        (ENGLISH, "<think>lift and drag</think>Its wings make lift.", 1),
        (CHINESE, "<think>升力和阻力</think>机翼产生升力。", 1),
        (CHINESE, "<think>lift and drag</think>机翼产生升力。", 0),
        (ENGLISH, "<think>升力和阻力</think>Its wings make lift.", 0),
        (ENGLISH, "机翼产生升力。", 0),
        (CHINESE, "Its wings make lift.", 0),
        (CHINESE, "<think>升力</think>42", 1),
        (CHINESE, "42", 1),
        (CHINESE, "", 1),
        (ENGLISH, "Its 机翼产生升力", 0),
        ("你好 hello world", "Its wings make lift.", 1),
        ("1 + 1 = ?", "二", 1),
        ("Как это работает?", "Its wings make lift.", 0),
        ("Как это работает?", "Крыло создаёт подъёмную силу.", 1),
    ],
)
def test_consistency(question: str, response: str, expected: int) -> None:
    (score,) = LanguageConsistency().score([sample(response, question=question)])
    assert isinstance(score, Score) and score.value == expected


def test_the_last_user_turn_decides() -> None:
    one = sample("机翼产生升力。")
    turns = (Message("user", ENGLISH), Message("assistant", "Lift."), Message("user", CHINESE))
    (score,) = LanguageConsistency().score([one._replace(prompt=replace(one.prompt, messages=turns))])
    assert score == Score(1.0, "question Chinese, response Chinese")


def test_a_prompt_without_a_user_turn_is_refused_at_load() -> None:
    LanguageConsistency().check_reference(prompt())
    with pytest.raises(ValueError, match="no user turn"):
        LanguageConsistency().check_reference(replace(prompt(), messages=()))


def test_bad_share() -> None:
    with pytest.raises(ValueError, match=r"language\.share = 0.5"):
        LanguageConsistency(share=0.5)


def test_formulas_that_never_close_cost_little() -> None:
    assert language(r"\[ 你 \( $ " * 20_000) == "Chinese"
