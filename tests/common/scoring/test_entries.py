"""What is read of a file of responses, and the sentences for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import ConfigError, load_config
from common.scoring.entries import Entry, Reader
from common.types import Message, Rollout, Transcript
from tests.common.rewards.own_verifiers import shouts
from tests.numpy_run import train
from tests.runs import lowercase_run, read_lines
from tests.scoring import judged_run, write_answers
from tests.tiny import CHATML

OPENING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def run_file(folder: Path, template: str = CHATML) -> Path:
    """A run file of judges whose policy has a chat template."""
    file = judged_run(folder)
    policy = folder / "model"
    (policy / "chat_template.jinja").write_text(template)
    return file


def read(folder: Path, *records: dict[str, Any], words: tuple[str, ...] = (), label: str | None = None) -> list[Entry]:
    loaded = load_config([folder / "run.yaml"], words)
    return Reader(loaded, label).read(write_answers(folder / "answers.jsonl", records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_file(tmp_path_factory.mktemp("run")).parent


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a template that opens the think block."""
    return run_file(tmp_path_factory.mktemp("opening"), OPENING).parent


PLAIN = {"prompt": "Why?", "response": "Because.", "label": "safety"}


def test_a_prompt_with_its_response(folder: Path) -> None:
    first, second = read(folder, PLAIN | {"id": 7, "reference": "So."}, PLAIN)
    assert (first.id, second.id) == ("7", "answers-2")
    assert first.sample.prompt.messages == (Message("user", "Why?"),)
    assert first.sample.prompt.reference == "So."
    assert first.sample.rollout == Transcript("Because.", None, "Because.", None)


def test_the_last_turn_of_a_conversation_is_the_response_and_no_reference(folder: Path) -> None:
    turns = [{"from": "human", "value": "一"}, {"from": "gpt", "value": "二"}, {"from": "human", "value": "三"}]
    said = {"from": "gpt", "value": "<think>四</think>五"}
    [entry] = read(folder, {"conversations": [*turns, said], "label": "safety"})
    assert entry.sample.prompt.messages[-1] == Message("user", "三")
    assert entry.sample.prompt.reference is None
    assert entry.sample.rollout == Transcript("<think>四</think>五", "四", "五", None)
    [entry] = read(folder, {"conversations": [*turns, said], "response": "六", "label": "safety"})
    assert entry.sample.prompt.reference == "<think>四</think>五"
    assert entry.sample.rollout.text == "六"


def test_a_label_for_records_without_one(folder: Path) -> None:
    bare = {"prompt": "Why?", "response": "So."}
    extra = bare | {"extra_info": {"label": "value"}}
    found = read(folder, bare, extra, PLAIN, label="both")
    assert [entry.sample.prompt.label for entry in found] == ["both", "value", "safety"]


@pytest.mark.parametrize(
    ("response", "opened", "reasoning", "answer"),
    [
        ("<think>a</think>b", None, "a", "b"),
        ("<think>a", None, None, ""),
        ("a</think>b", None, None, "a</think>b"),
        ("a</think>b", True, "a", "b"),
        ("a", True, None, ""),
        ("<think>a</think>b", False, "a", "b"),
    ],
)
def test_reasoning_is_split_as_the_sampler_does(
    folder: Path, response: str, opened: bool | None, reasoning: str | None, answer: str
) -> None:
    [entry] = read(folder, PLAIN | {"response": response, "opened": opened})
    assert entry.sample.rollout == Transcript(response, reasoning, answer, None)


def test_a_template_that_opens_the_think_block(opening: Path) -> None:
    said = [("a</think>b", {}), ("<think>a</think>b", {}), ("b", {"opened": False}), ("a", {"opened": True})]
    found = read(opening, *(PLAIN | {"response": text} | more for text, more in said))
    parts = [(entry.sample.rollout.reasoning_text, entry.sample.rollout.answer_text) for entry in found]
    assert parts == [("a", "b"), ("a", "b"), (None, "b"), (None, "")]
    with pytest.raises(ConfigError, match=r"answers.jsonl:1: the chat template of model.path opens a think block"):
        read(opening, PLAIN)


def test_the_tokenizer_is_not_read_where_no_record_needs_it(folder: Path) -> None:
    assert read(folder, PLAIN | {"opened": False}, words=("model.path=nowhere/at/all",))
    with pytest.raises(ConfigError, match=r"model.path = 'nowhere/at/all' \(command line\): no such folder"):
        read(folder, PLAIN, words=("model.path=nowhere/at/all",))


def test_what_a_record_expects(folder: Path) -> None:
    found = read(
        folder,
        PLAIN | {"verdict": "Unsafe"},
        PLAIN | {"label": "both", "expected": {"safety": "Safe", "good": 0.5}},
        PLAIN | {"label": "both", "expected": {"safety": 1}},
        PLAIN,
    )
    expected = [entry.expected for entry in found]
    assert expected == [{"safety": "Unsafe"}, {"safety": "Safe", "good": 0.5}, {"safety": 1}, {}]


def test_a_runs_records_are_its_rollouts(tmp_path: Path) -> None:
    file = lowercase_run(tmp_path, run={"steps": 2})
    assert train(file).status == 0
    entries = Reader(load_config([file]), None).read(tmp_path / "run")
    records = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert [entry.sample.rollout.text for entry in entries] == [record["response"] for record in records]
    assert len({entry.id for entry in entries}) == len(records) == 32
    for entry, record in zip(entries, records, strict=True):
        rollout = entry.sample.rollout
        assert isinstance(rollout, Rollout)
        np.testing.assert_array_equal(rollout.token_ids, record["token_ids"])
        assert rollout.answer_text == record["answer"]
        assert list(rollout.answer) == record["spans"]["answer"]
        assert {name: score.value for name, score in entry.recorded.items()} == record["scores"]
        assert shouts(entry.sample) in (0.0, 1.0)


# name: (a record, what the error says)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no response": ({"prompt": "Why?", "label": "safety"}, "has no 'response' (a string), nor conversations"),
    "a number for a response": (PLAIN | {"response": 3}, "has no 'response' (a string)"),
    "nothing but an answer": (
        {"conversations": [{"from": "gpt", "value": "So."}], "label": "safety"},
        "'conversations' must be a non-empty list",
    ),
    "an unanswered conversation": (
        {"conversations": [{"from": "human", "value": "Why?"}], "label": "safety"},
        "has no 'response' (a string), nor conversations that end with a gpt turn",
    ),
    "no label": ({"prompt": "Why?", "response": "So."}, "has no 'label', at top level or in extra_info. Add it, or"),
    "no prompt": ({"response": "So.", "label": "safety"}, "has neither 'prompt' nor 'conversations'"),
    "opened": (PLAIN | {"opened": "yes"}, "'opened' must be true or false"),
    "tokens": (PLAIN | {"token_ids": [1, -1]}, "'token_ids' must be a list of token ids"),
    "expected": (PLAIN | {"expected": "Safe"}, "'expected' must be an object of verifier: verdict or number"),
    "huge": (PLAIN | {"label": "safety", "expected": {"safety": 10**400}}, "that is beyond 1e+100"),
    "another's verdict": (
        PLAIN | {"verdict": "good"},
        "expects the verdict 'good' of 'safety': choose one of 'Safe', 'Unsafe', 'Refusal'",
    ),
    "a verdict of a rule": (
        PLAIN | {"label": "length", "expected": {"length": "short"}},
        "expects the verdict 'short' of 'length': it gives numbers alone",
    ),
    "not asked": (
        PLAIN | {"expected": {"good": 1.0}},
        "expects something of 'good', which the label 'safety' does not",
    ),
    "two judges": (
        PLAIN | {"label": "both", "verdict": "Safe"},
        "for a label with one judge, and 'both' has safety, good",
    ),
    "no judge": (PLAIN | {"label": "length", "verdict": "Safe"}, "for a label with one judge, and 'length' has none"),
    "neither": (PLAIN | {"expected": {"safety": True}}, "expects True of 'safety', which is neither"),
    "a run's record of another version": ({"messages": [{"role": "user", "content": "?"}]}, "but no 'prompt_id'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_record_is_named_or_skipped(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record, said = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        read(folder, PLAIN, record)
    assert f"{folder / 'answers.jsonl'}:2: " in str(caught.value)
    assert said in str(caught.value)
    assert "Mend the record, or set data.on_bad_record to skip." in str(caught.value)
    assert len(read(folder, PLAIN, record, words=("data.on_bad_record=skip",))) == 1
    assert "1 bad records skipped, the first: " in capsys.readouterr().err


def test_a_damaged_record_of_a_run(tmp_path: Path) -> None:
    file = lowercase_run(tmp_path, run={"steps": 1})
    assert train(file).status == 0
    rollouts = tmp_path / "run" / "rollouts.jsonl"
    good = read_lines(rollouts)[0]
    changes = {"messages": 3, "spans": [], "logprobs": "x", "scores": {"instructions": "much"}, "response": None}
    for field, value in changes.items():
        rollouts.write_text(json.dumps(good | {field: value}) + "\n")
        with pytest.raises(ConfigError, match=r"rollouts.jsonl:1: "):
            Reader(load_config([file]), None).read(rollouts)


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    reader = Reader(load_config([folder / "run.yaml"]), None)
    with pytest.raises(ConfigError, match="is not a run folder"):
        reader.read(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        reader.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no usable record"):
        reader.read(tmp_path / "empty.jsonl")
