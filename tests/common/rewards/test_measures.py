"""Counting words, sentences, paragraphs and tables."""

import pytest

from common.rewards.rules.measures import (
    Table,
    count_paragraphs,
    count_sentences,
    count_words,
    headings,
    is_simplified,
    is_traditional,
    tables,
    unfence,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("...", 0),
        ("one two three", 3),
        ("Don't use well-known words.", 4),
        ("It costs 1,234.50 in 3D", 5),
        ("今天天气很好。", 6),
        ("我爱 Python 编程", 5),
        ("**bold** _it_", 2),
    ],
)
def test_words(text: str, expected: int) -> None:
    assert count_words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three?", 3),
        ("Really?! Yes... no.", 3),
        ("It is 3.14 exactly. See example.com now.", 2),
        ("Dr. Smith met Mr. Lee, e.g. at noon.", 1),
        ('He said "go." She went.', 2),
        ("今天很好。我去公园！你呢？", 3),
        ("她说：“好。”然后走了。", 2),
        ("1. Wash it.\n2. Dry it.", 2),
        ("# Title\n\nOne sentence.", 2),
    ],
)
def test_sentences(text: str, expected: int) -> None:
    assert count_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("a", 1),
        ("a\nb", 1),
        ("a\n\nb", 2),
        ("a\n \n\n\nb\n\n", 2),
        ("# Title\n\na\n\n---\n\nb", 2),
        ("一\n\n二", 2),
    ],
)
def test_paragraphs(text: str, expected: int) -> None:
    assert count_paragraphs(text) == expected


TABLE = "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TABLE, [Table(2, 2)]),
        (f"Here:\n\n{TABLE}\n\nand\n\n{TABLE}\n", [Table(2, 2)] * 2),
        ("a | b\n--- | ---\n1 | 2", [Table(2, 1)]),
        ("| a |\n|---|\n", [Table(1, 0)]),
        (r"| a \| b | c |" + "\n|---|---|\n| 1 | 2 |", [Table(2, 1)]),
        ("| a | b |\n|---|\n| 1 | 2 |", []),
        ("| a | b |\n| 1 | 2 |", []),
        ("a\n---\nb", []),
        (f"```markdown\n{TABLE}\n```", [Table(2, 2)]),
        (f"text\n```\n{TABLE}\n```\n", []),
    ],
)
def test_tables(text: str, expected: list[Table]) -> None:
    assert tables(text) == expected


def test_headings_outside_code() -> None:
    assert headings("# a\n\n### b\n#no\n```\n# code\n```\n####### seven") == [1, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("```json\n{}\n```", "{}"), ("```\na\n```\n", "a"), (" a ", "a"), ("```\na\n```\nb\n```\nc\n```", None)],
)
def test_unfence(text: str, expected: str | None) -> None:
    assert unfence(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "simplified", "traditional"),
    [
        ("这个问题很简单", True, False),
        ("這個問題很簡單", False, True),
        ("你好", True, True),
        ("這個问题很简单", False, False),
    ],
)
def test_simplified_and_traditional(text: str, simplified: bool, traditional: bool) -> None:
    assert (is_simplified(text), is_traditional(text)) == (simplified, traditional)
