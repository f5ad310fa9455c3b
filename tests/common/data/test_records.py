"""Lines of JSONL become prompts: both record shapes, every turn, labels, references and images, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from common.data.records import BadRecord, read_records
from common.types import Message, Prompt

USER = [{"role": "user", "content": "hi"}]


def read(folder: Path, *records: Any, key: str | None = None) -> list[Prompt | BadRecord]:
    """Records, or raw lines, as a file that is read back."""
    file = folder / "data.jsonl"
    file.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")
    return list(read_records(file, key))


def prompt(folder: Path, record: dict[str, Any], key: str | None = None) -> Prompt:
    (found,) = read(folder, record, key=key)
    assert isinstance(found, Prompt), found
    return found


def reason(folder: Path, record: Any, key: str | None = None) -> str:
    """Why a record on line 2 is bad, after the file and the line."""
    good, found = read(folder, {"prompt": "hi", "label": "l", "other": 1}, record, key=key)
    assert isinstance(good, Prompt if key in (None, "other") else BadRecord)
    assert isinstance(found, BadRecord)
    where, _, why = str(found).partition(":2: ")
    assert where == str(folder / "data.jsonl")
    return why


# Shapes ---------------------------------------------------------------------------------------------------------------


def test_prompt_shape_keeps_every_turn_and_the_system_message(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    found = prompt(tmp_path, {"id": 7, "prompt": turns, "label": "l", "reference": "4"})
    expected = Message("system", "Be kind."), Message("user", "1"), Message("assistant", "2"), Message("user", "3")
    assert found == Prompt("7", "l", expected, "4")


def test_prompt_may_be_a_string(tmp_path: Path) -> None:
    assert prompt(tmp_path, {"prompt": "hi", "label": "l"}).messages == (Message("user", "hi"),)


def test_conversation_shape(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "1"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "3"},
        {"from": "gpt", "value": "the answer"},
    ]
    found = prompt(tmp_path, {"conversations": turns, "label": "l"})
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "user"]
    assert [message.content for message in found.messages] == ["Be kind.", "1", "2", "3"]
    assert found.reference == "the answer"
    assert prompt(tmp_path, {"conversations": turns[:4], "label": "l"}).reference is None
    assert prompt(tmp_path, {"conversations": turns, "label": "l", "reference": "given"}).reference == "given"


def test_last_answer_of_a_prompt_list_is_its_reference(tmp_path: Path) -> None:
    found = prompt(tmp_path, {"prompt": [*USER, {"role": "assistant", "content": "yes"}], "label": "l"})
    assert (found.messages, found.reference) == ((Message("user", "hi"),), "yes")


@pytest.mark.parametrize(
    "fields", [{"label": "l"}, {"extra_info": {"label": "l"}}, {"label": None, "extra_info": {"label": "l"}}]
)
def test_label_at_the_top_or_in_extra_info(fields: dict[str, Any], tmp_path: Path) -> None:
    assert prompt(tmp_path, {"prompt": "hi", **fields}).label == "l"


def test_label_at_the_top_comes_first(tmp_path: Path) -> None:
    assert prompt(tmp_path, {"prompt": "hi", "label": "top", "extra_info": {"label": "below"}}).label == "top"


def test_default_id_is_file_and_line(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "a", "label": "l"}, "", {"prompt": "b", "label": "l", "id": None})
    assert [record.id for record in found if isinstance(record, Prompt)] == ["data-1", "data-3"]


# References -----------------------------------------------------------------------------------------------------------

# In the order in which they are looked for.
PLACES: dict[str, dict[str, Any]] = {
    "reference": {"reference": "reference"},
    "chosen": {"chosen": "chosen"},
    "model": {"reward_model": {"ground_truth": "model"}},
    "truth": {"ground_truth": "truth"},
    "constraints": {"extra_info": {"constraints": "constraints"}},
    "answer": {"prompt": [*USER, {"role": "assistant", "content": "answer"}]},
}


def test_reference_order(tmp_path: Path) -> None:
    names = list(PLACES)
    for first in range(len(names)):
        record: dict[str, Any] = {"prompt": USER, "label": "l"}
        for name in names[first:]:
            record |= PLACES[name]
        assert prompt(tmp_path, record).reference == names[first]
    assert prompt(tmp_path, {"prompt": USER, "label": "l"}).reference is None


@pytest.mark.parametrize("reference", [0, False, "", [], [["Length", "Words", "at most 3 words"]], {"a": 1}, 2.5])
def test_reference_is_kept_as_it_is(reference: Any, tmp_path: Path) -> None:
    found = prompt(tmp_path, {"prompt": USER, "label": "l", "reference": reference, "ground_truth": "other"})
    assert (found.reference, type(found.reference)) == (reference, type(reference))


def test_configured_reference_key_comes_before_all(tmp_path: Path) -> None:
    record = {"prompt": USER, "label": "l", "reference": "a", "solution": "b"}
    assert prompt(tmp_path, record, key="solution").reference == "b"
    assert reason(tmp_path, {"prompt": USER, "label": "l", "reference": "a"}, "other") == (
        "has no field 'other' (data.reference_key)."
    )


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_are_carried_in_the_order_of_their_markers(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image> and <image>?"},
        {"from": "gpt", "value": "Two."},
        {"from": "human", "value": "And <image>?"},
    ]
    found = prompt(tmp_path, {"conversations": turns, "images": ["a.png", "b.png", "c.png"], "label": "l"})
    assert found.images == ("a.png", "b.png", "c.png")
    assert [message.content for message in found.messages] == ["<image> and <image>?", "Two.", "And <image>?"]


@pytest.mark.parametrize("fields", [{}, {"images": []}, {"images": None}])
def test_no_images(fields: dict[str, Any], tmp_path: Path) -> None:
    assert prompt(tmp_path, {"prompt": USER, "label": "l", **fields}).images == ()


def test_the_word_image_in_a_record_that_has_no_images_is_text(tmp_path: Path) -> None:
    found = prompt(tmp_path, {"prompt": "What does <image> do in HTML?", "label": "l"})
    assert (found.messages[0].content, found.images) == ("What does <image> do in HTML?", ())


# Bad records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("{", "not valid JSON ("),
        ("[" * 100_000, "not valid JSON ("),
        ('{"prompt": "hi", "label": "l", "reference": NaN}', "holds a number or a character that no UTF-8 JSON file"),
        ('{"prompt": "hi", "label": "l", "reference": 1e999}', "holds a number or a character that no UTF-8 JSON"),
        ('{"prompt": "half \\ud800", "label": "l"}', "holds a number or a character that no UTF-8 JSON file can carry"),
        ("[1]", "is a JSON list, not an object. Write one JSON object a line."),
        ("null", "is a JSON NoneType, not an object."),
        ({"label": "l", "text": 1}, "has neither 'prompt' nor 'conversations'; its fields are label, text."),
        ({}, "has neither 'prompt' nor 'conversations'; its fields are none."),
        ({"prompt": [], "label": "l"}, "'prompt' must be a non-empty list of turns."),
        ({"prompt": 5, "label": "l"}, "'prompt' must be a non-empty list of turns."),
        ({"conversations": {}, "label": "l"}, "'conversations' must be a non-empty list of turns."),
        ({"prompt": ["hi"], "label": "l"}, "prompt[0].role must be one of human, user, gpt, assistant, system."),
        ({"prompt": [*USER, {"role": "tool", "content": ""}]}, "prompt[1].role must be one of"),
        ({"prompt": [{"role": ["user"], "content": ""}]}, "prompt[0].role must be one of"),
        ({"conversations": [{"from": "human"}], "label": "l"}, "conversations[0].value must be a string."),
        ({"prompt": [{"role": "user", "content": [{"text": "a"}]}]}, "prompt[0].content must be a string."),
        (
            {"prompt": [{"role": "system", "content": "a"}], "label": "l"},
            "the conversation has no user turn to answer.",
        ),
        ({"prompt": [{"role": "assistant", "content": "a"}], "label": "l"}, "the conversation has no user turn"),
        ({"prompt": "hi"}, "has no 'label' (a string, at top level or in extra_info); the reward recipe needs it."),
        ({"prompt": "hi", "label": 3}, "has no 'label'"),
        ({"prompt": "hi", "label": ""}, "has no 'label'"),
        ({"prompt": "hi", "extra_info": []}, "has no 'label'"),
        ({"prompt": "hi", "label": "l", "images": "a.png"}, "'images' must be a list of paths or URLs."),
        ({"prompt": "hi", "label": "l", "images": [1]}, "'images' must be a list of paths or URLs."),
        ({"prompt": "hi", "label": "l", "images": ["a.png"]}, "has 1 images but 0 <image> markers. Give each image"),
        ({"prompt": "<image><image>", "label": "l", "images": ["a"]}, "has 1 images but 2 <image> markers."),
        ({"prompt": "<image>", "label": "l", "images": []}, "has 0 images but 1 <image> markers."),
    ],
)
def test_bad_record_has_file_line_and_reason(record: Any, why: str, tmp_path: Path) -> None:
    assert reason(tmp_path, record).startswith(why)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"prompt": "ok", "label": "l"}\n{"prompt": "\xff", "label": "l"}\n')
    good, bad = read_records(file, None)
    assert isinstance(good, Prompt)
    assert str(bad).startswith(f"{file}:2: not valid JSON ('utf-8' codec can't decode byte 0xff")
    assert str(bad).endswith("Write one JSON object a line, in UTF-8.")


def test_line_endings_blank_lines_and_odd_characters(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    # U+2028 ends a line for some readers; inside JSON it is a character like any other.
    file.write_bytes('\ufeff{"prompt": "a\u2028b", "label": "l"}\r\n \r\n{"prompt": "c", "label": "l"}'.encode())
    found = [record.messages[0].content for record in read_records(file, None) if isinstance(record, Prompt)]
    assert found == ["a\u2028b", "c"]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        list(read_records(tmp_path / name, None))
    assert str(caught.value).startswith(f"data file {tmp_path / name}: cannot be read (")
    assert str(caught.value).endswith("or start in the folder that it is relative to.")
