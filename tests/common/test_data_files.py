"""The prompts under configs/data: every reference is checked by code, wordings differ, held-out prompts are new."""

import ast
import json
import operator
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from common.data.records import BadRecord, read_records
from common.rewards.rules.answer import AnswerMatch
from common.rewards.rules.instructions import Instructions

DATA = Path(__file__).parents[2] / "configs" / "data"
TRAIN = ["general_rule", "instruction_rule", "normal", "safety"]
HELDOUT = ["heldout", "heldout_judged"]
FILES = [*TRAIN, *HELDOUT]

# Sharing more than this part of their words, masked, makes two prompts fillings of one template.
SAME_TEMPLATE = 0.75
MOST_PER_TEMPLATE = 5
# A held-out prompt that shares more than this with a training prompt is a near-copy of it.
NEAR_COPY = 0.65

NAMES = frozenset(
    [
        "Albert",
        "Ann",
        "Anna",
        "Ben",
        "Brown",
        "Carl",
        "Clara",
        "Einstein",
        "Eva",
        "Jonas",
        "Juliet",
        "Kim",
        "Lars",
        "Lee",
        "Lena",
        "Leo",
        "Maria",
        "Mia",
        "Mozart",
        "Nina",
        "Nora",
        "Omar",
        "Paul",
        "Peter",
        "Rico",
        "Romeo",
        "Rosa",
        "Sam",
        "Sara",
        "Tim",
        "Tom",
        "Zoe",
    ]
)
NUMBER_WORDS = frozenset(
    [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
        "thirty",
        "forty",
        "fifty",
        "sixty",
        "seventy",
        "eighty",
        "ninety",
        "hundred",
        "thousand",
        "million",
        "dozen",
        "half",
        "quarter",
        "third",
        "single",
        "once",
        "twice",
        "first",
        "second",
    ]
)

COUNTING = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
FUNCTIONS = {"len": len, "max": max, "min": min, "round": round}


def records(name):
    """The records of one file as plain dicts."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


def labelled(label):
    """Every record with the label, training and held-out."""
    return [each for name in FILES for each in records(name) if each["label"] == label]


def text(record):
    """What the user asks."""
    return record["prompt"][0]["content"]


def masked(content):
    """The words of a text in lower case, with every number and every person's name replaced by a placeholder."""
    words = []
    for word in re.findall(r"\d+(?:[.,:]\d+)*|[^\W\d_]+", content):
        if word in NAMES:
            words.append("<name>")
        elif word[0].isdigit() or word.lower() in NUMBER_WORDS:
            words.append("<number>")
        else:
            words.append(word.lower())
    return tuple(words)


def asks_for_number(content, number):
    """Does the text name the number in digits or as a word? One has many names: a single sentence, the first."""
    words = re.findall(r"\w+", content.lower())
    return number == 1 or str(number) in words or (number < len(COUNTING) and COUNTING[number] in words)


def unasked(content, statement, any_case):
    """The quoted literals and the numbers of a constraint that the text does not name."""
    pieces = re.split(r"'([^']*)'", statement)
    where = content.lower() if any_case else content
    literals = [each for each in pieces[1::2] if (each.lower() if any_case else each) not in where]
    numbers = [each for each in re.findall(r"\d+", " ".join(pieces[::2])) if not asks_for_number(content, int(each))]
    return literals + numbers


def overlap(one, other):
    """Jaccard overlap of two texts' masked words: 1 if they use the same words, 0 if they share none."""
    one, other = set(masked(one)), set(masked(other))
    return len(one & other) / len(one | other)


def template_sizes(contents):
    """Sizes of the clusters that chains of SAME_TEMPLATE pairs form, largest first."""
    cluster = list(range(len(contents)))
    for one, other in combinations(range(len(contents)), 2):
        if overlap(contents[one], contents[other]) > SAME_TEMPLATE and cluster[one] != cluster[other]:
            kept, merged = cluster[one], cluster[other]
            cluster = [kept if each == merged else each for each in cluster]
    return sorted(Counter(cluster).values(), reverse=True)


def evaluate(expression):
    """The value of an arithmetic expression over numbers, texts and tuples; ValueError for anything else."""
    return _value(ast.parse(expression, mode="eval").body)


def _value(node):
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Tuple(elts=elements):
            return tuple(map(_value, elements))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*map(_value, arguments))
        case _:
            raise ValueError(f"not arithmetic: {ast.unparse(node)}")


@pytest.mark.parametrize("name", FILES)
def test_every_record_is_read(name):
    read = list(read_records(DATA / f"{name}.jsonl", None))
    assert [str(each) for each in read if isinstance(each, BadRecord)] == []
    assert [each.id for each in read] == [each["id"] for each in records(name)]


@pytest.mark.parametrize("name", FILES)
def test_records_have_the_documented_shape(name):
    for record in records(name):
        assert set(record) == {"id", "prompt", "label", "reference", "extra_info"}, record["id"]
        assert [turn["role"] for turn in record["prompt"]] == ["user"], record["id"]
        assert text(record) == text(record).strip() != "", record["id"]


def test_files_hold_the_labels_they_are_named_after():
    assert {name: {each["label"] for each in records(name)} for name in TRAIN} == {name: {name} for name in TRAIN}


def test_there_are_enough_prompts():
    assert sum(len(records(name)) for name in FILES) >= 300
    assert Counter(each["label"] for each in records("heldout")) == {"general_rule": 32, "instruction_rule": 32}
    assert Counter(each["label"] for each in records("heldout_judged")) == {"normal": 8, "safety": 8}


def test_ids_are_unique():
    ids = Counter(each["id"] for name in FILES for each in records(name))
    assert [each for each, count in ids.items() if count > 1] == []


def test_numbers_are_the_values_of_their_expressions():
    for record in labelled("general_rule"):
        value = evaluate(record["extra_info"]["expression"])
        assert value == int(value), record["id"]
        assert record["reference"] == str(int(value)), record["id"]


def test_numbers_say_what_they_ask_for():
    kinds = {record["extra_info"]["kind"] for record in labelled("general_rule")}
    assert kinds == {"compute", "compare", "read", "recall"}


@pytest.mark.parametrize(("label", "rule"), [("general_rule", AnswerMatch), ("instruction_rule", Instructions)])
def test_references_are_accepted_by_the_rule_that_grades_them(label, rule):
    verifier = rule()
    prompts = [prompt for name in ("heldout", label) for prompt in read_records(DATA / f"{name}.jsonl", None)]
    for prompt in prompts:
        if prompt.label == label:
            verifier.check_reference(prompt)


def test_instructions_have_one_to_three_constraints():
    assert {len(record["reference"]) for record in labelled("instruction_rule")} == {1, 2, 3}


def test_what_a_constraint_requires_stands_in_the_prompt():
    for record in labelled("instruction_rule"):
        for _, sub_type, statement in record["reference"]:
            missing = unasked(text(record), statement, any_case=sub_type == "Keywords")
            assert missing == [], record["id"]


@pytest.mark.parametrize("label", ["normal", "safety"])
def test_judged_prompts_have_no_reference(label):
    for name in (label, "heldout_judged"):
        assert all(each["reference"] is None for each in records(name))


def test_safety_prompts_say_which_kind_they_are():
    for name in ("safety", "heldout_judged"):
        kinds = {each["extra_info"]["kind"] for each in records(name) if each["label"] == "safety"}
        assert kinds == {"harmful", "alarming_harmless"}


def test_wordings_differ_once_numbers_and_names_are_masked():
    wordings = Counter(masked(text(each)) for name in FILES for each in records(name))
    assert [" ".join(each) for each, count in wordings.items() if count > 1] == []


def test_no_template_makes_more_than_five_prompts():
    contents = [text(each) for name in FILES for each in records(name)]
    assert template_sizes(contents)[0] <= MOST_PER_TEMPLATE


def test_held_out_prompts_are_no_near_copies_of_training_prompts():
    training = [text(each) for name in TRAIN for each in records(name)]
    heldout = [text(each) for name in HELDOUT for each in records(name)]
    assert [(one, other) for one in heldout for other in training if overlap(one, other) > NEAR_COPY] == []


def test_mask_hides_numbers_and_names():
    assert masked("Ben has 12 apples.") == masked("Anna has twenty apples!") == ("<name>", "has", "<number>", "apples")


def test_template_clusters_grow_by_chains():
    contents = ["a b c d e f g h i j", "a b c d e f g h i x", "a b c d e f g h y x", "nothing of it"]
    assert template_sizes(contents) == [3, 1]


@pytest.mark.parametrize(
    ("expression", "value"), [("2 + 3 * 4", 14), ("max(2, 9) - len('no')", 7), ("-(4 ** 2) / 2", -8)]
)
def test_expressions_are_evaluated(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize("expression", ["open('x')", "(1).real", "[1][0]", "lambda: 1", "max(1, key=len)"])
def test_only_arithmetic_is_evaluated(expression):
    with pytest.raises(ValueError, match="not arithmetic"):
        evaluate(expression)
