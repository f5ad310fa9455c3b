"""Every kind of constraint: statement, an answer that meets it, an answer that does not."""

import time

import pytest

from common.rewards.rules.answer import bare_answers, normalise
from common.rewards.rules.constraints import parse_constraint, parse_reference
from common.rewards.rules.statements import QUANTITY, Bound, bound, read

TABLE = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"

CASES = [
    ("Keywords", "must include the keyword 'apple'", "An Apple a day", "pineapples"),
    ("Keywords", "include the keywords 'a b', 'c' and 'd'", "c d a b", "c a b"),
    ("Keywords", "include the words 'x' or 'y'", "y", "z"),
    ("Keywords", "include at least two of the keywords 'x', 'y', 'z'", "z x", "z"),
    ("Keywords", "The keyword “C++” must be included.", "I write c++.", "I write C."),
    ("Keywords", "use the word 'go' at least 2 times", "Go, go!", "Go, going"),
    ("Keywords", "the word 'go' must appear exactly twice", "Go, go!", "go go go"),
    ("Keywords", "do not use the word 'very'", "everything", "Very good"),
    ("Keywords", "The answer must not include the keywords 'x' or 'y'", "z", "y"),
    ("Keywords", "avoid the words 'x', 'y'", "z", "x"),
    ("Keywords", "the word 'x' must not appear", "z", "x"),
    ("Keywords", "必须包含关键词“苹果”", "我吃苹果。", "我吃梨。"),
    ("Keywords", "包含关键词“苹果”、“梨”", "苹果和梨", "苹果"),
    ("Keywords", "不要使用词语“非常”", "很好", "非常好"),
    ("Keywords", "回答中不得出现“非常”", "很好", "非常好"),
    ("Keywords", "“好”至少出现2次", "好好", "好"),
    ("Identifiers", "start with 'Answer:'", "Answer: 4", "answer: 4"),
    ("Identifiers", "The response must end with 'Done'", "It is Done", "Done."),
    ("Identifiers", "start with 'A' and end with 'B'", "A to B", "A to C"),
    ("Identifiers", "wrap the answer in '[' and ']'", "[x]", "[x"),
    ("Identifiers", "start with 'xx' and end with 'x'", "xxx", "xx"),
    ("Identifiers", "wrap the title in '<<' and '>>'", "<<My title>>\ntext", "<< >>\ntext"),
    ("Identifiers", "以“答案：”开头", "答案：四", "四"),
    ("Identifiers", "以“甲”开头，以“乙”结尾", "甲到乙", "甲到丙"),
    ("Identifiers", "用“【”和“】”包裹标题", "【题】\n文", "题\n文"),
    ("Punctuation", "do not use commas", "a b", "a，b"),
    ("Punctuation", "do not use any commas or semicolons", "a. b", "a; b"),
    ("Punctuation", "avoid exclamation marks", "No.", "No!"),
    ("Punctuation", "end with an exclamation mark", "**Go!**", "Go! Now."),
    ("Punctuation", "Ending punctuation must be a period.", "好。", "好"),
    ("Punctuation", "must not end with a question mark", "So.", "So?"),
    ("Punctuation", "use at least two question marks", "A? B?", "A?"),
    ("Punctuation", "use no punctuation at all", "plain words 1", "plain words."),
    ("Punctuation", "use exactly one ellipsis", "So...", "So. Then. Now."),
    ("Punctuation", "不要使用逗号", "你好。", "你，好"),
    ("Punctuation", "以感叹号结尾", "你好！", "你好"),
    ("Punctuation", "至少使用两个问号", "是？否？", "是？"),
    ("Punctuation", "不要使用任何标点符号", "你好", "你好。"),
    ("Words", "at most 3 words", "one two three", "one two three four"),
    ("Words", "The answer must contain at least three words.", "one two three", "one two"),
    ("Words", "exactly 2 words", "one two", "one"),
    ("Words", "between 2 and 3 words", "one two", "one"),
    ("Words", "fewer than 3 words", "one two", "one two three"),
    ("Words", "no more than 2 words in total", "one two", "one two three"),
    ("Words", "The answer must not exceed 2 words", "one two", "one two three"),
    ("Words", "Range: 2-3 words", "one two three", "one"),
    ("Words", "2 or more words", "one two three", "one"),
    ("Words", "不超过3字", "你好吗", "你好不好"),
    ("Words", "回答应在2到3字之间", "你好", "你"),
    ("Words", "3字以内", "你好吗", "你好不好"),
    ("Words", "字数在2到3之间", "你好", "你"),
    ("Sentences", "at least two sentences", "One. Two.", "One, two."),
    ("Sentences", "恰好两句话", "一。二。", "一，二。"),
    ("Paragraphs", "exactly 2 paragraphs", "a\n\nb", "a\nb"),
    ("Paragraphs", "分为两段", "一\n\n二", "一"),
    ("Json", "be valid JSON", "[1]", "1"),
    ("Json", "a valid JSON object", '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
    (
        "Json",
        "The answer must be a JSON object with the keys 'name' and 'age'",
        '{"name": 1, "age": 2, "x": 3}',
        '{"name": 1}',
    ),
    ("Json", "a JSON object with exactly the keys 'a' and 'b'", '{"b": 1, "a": 2}', '{"a": 1, "b": 2, "c": 3}'),
    ("Json", "a JSON array of 3 items", "[1, 2, 3]", "[1, 2]"),
    ("Json", "a JSON array with at least 2 items", "[1, 2, 3]", "[1]"),
    ("Json", "Object nesting levels must not exceed 2", '[{"a": {}}]', '{"a": [{"b": {}}]}'),
    ("Json", "a JSON array", "[]", '{"a": NaN}'),
    ("Json", "输出有效的JSON对象", "{}", "[]"),
    ("Json", "输出包含键“name”和“age”的JSON对象", '{"name": 1, "age": 2}', "{}"),
    ("Json", "输出包含3个元素的JSON数组", "[1, 2, 3]", "[1]"),
    ("Markdown", "a bullet list with exactly 2 items", "- a\n* b", "- a\n- b\n- c"),
    ("Markdown", "at least 2 bullet points", "- a\n  - b", "1. a\n2. b"),
    ("Markdown", "use a numbered list with 2 items", "1. a\n2) b", "- a\n- b"),
    ("Markdown", "use a bullet list", "- a", "a"),
    ("Markdown", "include a level 2 heading", "## a", "# a"),
    ("Markdown", "a heading of level 2 in markdown format", "## a", "##a"),
    ("Markdown", "at least two level 2 headings", "## a\n## b", "## a\n# b"),
    ("Markdown", "at least two heading levels", "# a\n## b", "# a\n# b"),
    ("Markdown", "at least 2 headings", "# a\n# b", "# a"),
    ("Markdown", "bold at least 2 words", "**a** and **b**", "**a** and *b*"),
    ("Markdown", "use bold text", "__a__", "** a **"),
    ("Markdown", "use a block quote", "> a", "a > b"),
    ("Markdown", "include a code block", "x\n```py\na = 1\n```", "```py\n```"),
    ("Markdown", "包含2项的无序列表", "- 甲\n- 乙", "- 甲"),
    ("Markdown", "包含一个二级标题", "## 甲", "### 甲"),
    ("Markdown", "至少加粗2处", "**甲**和**乙**", "**甲**"),
    ("Table", "a markdown table", TABLE, "a | b"),
    ("Table", "include a table with 2 columns", TABLE, "| a |\n|---|"),
    ("Table", "a table with no more than 2 rows", TABLE, TABLE + "\n| 5 | 6 |"),
    ("Table", "a table with 2 columns and 2 rows", TABLE, TABLE + "\n| 5 | 6 |"),
    ("Table", "If a table is used, it must not exceed 2 rows", "none", TABLE + "\n| 5 | 6 |"),
    ("Table", "包含一个2列2行的表格", TABLE, "没有"),
    ("XML", "be wrapped in <answer> tags", "<answer>4</answer>", "It is <answer>4</answer>"),
    ("XML", "be well-formed XML", "<a><b/></a>", "<a><b></a>"),
    ("XML", "valid XML with the root element <note>", "<note>x</note>", "<memo>x</memo>"),
    ("XML", "include the tags <Name> and <age>", 'So <Name k="1">x</Name> <age>1</age>', "<name>x</name><age>1</age>"),
    ("XML", "Each XML element must have no more than one attribute", '<a b="1"/>', '<a b="1" c="2"/>'),
    ("XML", "用<answer>标签包裹", "<answer>四</answer>", "四"),
    ("English", "in English", "Hello there", "你好"),
    ("English", "all lowercase", "all small 1", "Not small"),
    ("English", "The answer must be in all uppercase letters.", "LOUD!", "Loud"),
    ("English", "all capital letters", "LOUD", "你好"),
    ("English", "use capitalized letters for each word", "Every Word's 2nd Big", "Every word"),
    ("English", "Each word in the response must be capitalized", "Big Words", "123"),
    ("English", "每个单词首字母大写", "Big Words", "Big words"),
    ("Chinese", "The answer must be in Chinese", "这是 AI 模型的中文回答", "English"),
    ("Chinese", "in Simplified Chinese", "这个问题很简单", "這個問題很簡單"),
    ("Chinese", "Must use Traditional Chinese characters", "這個問題很簡單", "这个问题很简单"),
    ("Chinese", "使用简体中文", "这个问题很简单", "This is simple"),
]
FAMILY = {
    **dict.fromkeys(("Keywords", "Identifiers", "Punctuation"), "Content"),
    **dict.fromkeys(("Words", "Sentences", "Paragraphs"), "Length"),
    **dict.fromkeys(("Json", "Markdown", "Table", "XML"), "Format"),
    **dict.fromkeys(("English", "Chinese"), "Language"),
}


@pytest.mark.parametrize(("sub_type", "statement", "meets", "misses"), CASES, ids=[case[1] for case in CASES])
def test_constraint(sub_type: str, statement: str, meets: str, misses: str) -> None:
    constraint = parse_constraint([FAMILY[sub_type], sub_type, statement])
    assert constraint.statement == statement
    assert (constraint.check(meets), constraint.check(misses)) == (True, False)


def test_all_twelve_kinds_are_tested() -> None:
    assert {case[0] for case in CASES} == set(FAMILY)


@pytest.mark.parametrize(
    ("sub_type", "statement"),
    [
        ("Words", "be brief"),
        ("Words", "about 50 words"),
        ("Words", "at least 50 words in each section"),
        ("Words", "between 10 and 5 words"),
        ("Words", "at least 5 or fewer words"),
        ("Words", "fewer than 0 words"),
        ("Sentences", "must not contain at most 3 sentences"),
        ("Keywords", "include a fruit"),
        ("Keywords", "must include 'a' or 'b' and 'c'"),
        ("Keywords", "必须包含'春'或'夏'和'秋'"),
        ("Keywords", "include the keyword §"),
        ("Keywords", "Must include the keyword 'to' as part of the infinitive"),
        ("Identifiers", "Each example must start with 'Example:'"),
        ("Punctuation", "use little punctuation"),
        ("Json", "no JSON"),
        ("Markdown", "use headings wisely"),
        ("Table", "a table with columns"),
        ("XML", "some tags"),
        ("English", "use capitalized letters for each section title"),
        ("English", "must not be in English"),
        ("Chinese", "in Japanese"),
        ("Words", ""),
    ],
)
def test_a_statement_that_is_not_wholly_understood_is_an_error(sub_type: str, statement: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not understood; an example of what is|says two things|allows no count|outside of quotes"
    ):
        parse_constraint([FAMILY[sub_type], sub_type, statement])


@pytest.mark.parametrize(
    ("family", "sub_type", "statement"),
    [
        ("Table", "Row limit", "a table with no more than 5 rows"),
        ("content", "Keywords: Must include", "The answer must include the keyword 'Mulan'."),
        ("XML", "Number of attributes", "Each XML element must have no more than three attributes"),
    ],
)
def test_spellings_of_published_data(family: str, sub_type: str, statement: str) -> None:
    parse_constraint([family, sub_type, statement])


@pytest.mark.parametrize(
    ("family", "sub_type"), [("Content", "Words"), ("Length", "Characters"), ("", ""), ("Style", "Words")]
)
def test_unknown_kinds(family: str, sub_type: str) -> None:
    with pytest.raises(ValueError, match="Unknown constraint kind"):
        parse_constraint([family, sub_type, "at most 3 words"])


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("at least five", Bound(5, None)),
        ("more than 5", Bound(6, None)),
        ("no more than 5", Bound(0, 5)),
        ("less than 5", Bound(0, 4)),
        ("no less than 5", Bound(5, None)),
        ("eighteen", Bound(18, 18)),
        ("5 to 10", Bound(5, 10)),
        ("5-10", Bound(5, 10)),
        ("5 or fewer", Bound(0, 5)),
        ("不超过十二", Bound(0, 12)),
        ("超过十", Bound(11, None)),
        ("两", Bound(2, 2)),
        ("3至5", Bound(3, 5)),
        ("5以上", Bound(5, None)),
    ],
)
def test_bounds(quantity: str, expected: Bound) -> None:
    assert bound(quantity) == expected


@pytest.mark.parametrize(
    ("statement", "wording", "literals"),
    [
        ("The answer must not include the words 'a' or 'b'.", "not the words § or §", ["a", "b"]),
        ("Don't use the word 'Rick's'", "not the word §", ["Rick's"]),
        ("Please write at least 3 sentences.", "at least 3 sentences", []),
        ("请使用 <b> 标签", "§标签", ["<b>"]),
        ("你的回答必须不超过 20 字。", "不超过20字", []),
        ("use no more than 3 words", "no more than 3 words", []),
    ],
)
def test_reading(statement: str, wording: str, literals: list[str]) -> None:
    assert read(statement) == (wording, literals)


def test_hostile_formats_are_simply_not_met() -> None:
    json_object = parse_constraint(["Format", "Json", "be valid JSON"]).check
    assert not json_object("[" * 100_000) and not json_object("9" * 10_000) and not json_object('{"a": Infinity}')
    xml = parse_constraint(["Format", "XML", "be well-formed XML"]).check
    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>'
    assert not xml(bomb) and not xml("\ud800<a/>")
    assert xml("<a>" * 20_000 + "</a>" * 20_000)


def test_one_constraint_stays_a_list() -> None:
    """Upstream defect 9: a list of one constraint was flattened into its three strings."""
    triple = ["Length", "Words", "at most 3 words"]
    assert [constraint.statement for constraint in parse_reference([triple])] == ["at most 3 words"]
    with pytest.raises(ValueError, match=r"must be a list of .* also for one constraint"):
        parse_reference(triple)


@pytest.mark.parametrize("reference", [None, [], "at most 3 words", [["Length", "Words"]], [[1, 2, 3]], [{"a": 1}], 5])
def test_references_of_another_shape(reference: object) -> None:
    with pytest.raises(ValueError, match="constraint"):
        parse_reference(reference)


STAMMERS = [".", "…", "—", "[", "*", "_", "|", "|-|\n", "<b>", "```\n", "a.", "- ", "# ", "\n ", "$", "answer is ", "9"]


def test_stammering_costs_little_time() -> None:
    """A policy that repeats itself up to the length limit must not slow the checks down (nothing here is quadratic)."""
    statements = [*CASES, ("XML", "include the tags <b> and <i>", "", ""), ("Table", "a table with 3 columns", "", "")]
    checks = [parse_constraint([FAMILY[case[0]], case[0], case[1]]).check for case in statements]
    start = time.process_time()
    for stammer in STAMMERS:
        for check in checks:
            check(stammer * 20_000 + "x")
        normalise(stammer * 20_000 + "x")
        bare_answers(stammer * 20_000 + "x", "Paris")
        bare_answers(stammer * 20_000 + "x", "4")
    assert time.process_time() - start < 30


def test_quantity_pattern_has_no_groups() -> None:
    assert "(?P" not in QUANTITY and QUANTITY.count("(?:") == QUANTITY.count("(")
