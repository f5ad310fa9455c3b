"""What real servers replied, read by us: recorded once (`tests/engines/record.py`), asked and read again here.

The model behind all of them is the embedded one, so what they said is also what it computes in process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import load_config
from common.config.servers import ServerSection
from common.data.model_folder import model_folder
from common.serving.http import UNREADABLE, Call
from common.serving.in_process import InProcessModel
from common.serving.rendering import Renderer
from common.serving.served import DIALECTS
from tests.engines.questions import LABELS, MAX_TOKENS, QUESTIONS
from tests.engines.record import calls
from tests.training import ROOT

REPLIES = sorted((Path(__file__).parent / "replies").glob("*.json"))
MODEL = "embedded:smollm2"
# bf16 keeps 8 bits of a logit of 10 to 20.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


@pytest.fixture(scope="module")
def render() -> Renderer:
    return Renderer(model_folder(MODEL))


@pytest.fixture(scope="module")
def in_process() -> Iterator[InProcessModel]:
    from safework_torch.main import open_judge

    loaded = load_config([ROOT / "configs" / "quickstart.yaml"])
    yield InProcessModel(
        ServerSection(engine="in_process", model=MODEL), lambda folder: open_judge(loaded, folder), "fp32"
    )


def recorded(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def calls_again(record: dict[str, Any], render: Renderer) -> list[tuple[str, int, Call]]:
    """What is asked today where the record was made: kind, question and call, in the same order."""
    head = record["calls"][0]["kind"] == "head"
    older = record["version"].startswith("0.24.")
    properties = {} if older else {"logprob_token_ids": {}}
    api = {"components": {"schemas": {"CompletionRequest": {"properties": properties}}}}
    return list(calls(DIALECTS[record["engine"]], record["name"], render, head, api))


@pytest.mark.parametrize("engine", sorted(DIALECTS))
@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        {},
        {"choices": [None], "meta_info": None, "data": [None], "embedding": [[1], []]},
        {"choices": [{"text": "a\ud800", "logprobs": None}], "meta_info": {}, "text": "a\ud800", "data": None},
        {"choices": [{"text": None, "logprobs": []}], "meta_info": [], "text": 1, "embedding": [10**400]},
        {"data": [{"probs": [10**400]}], "choices": 1, "text": "", "meta_info": "", "embedding": {}},
        {"data": [{"probs": [[1.0]], "data": [[[1.0]]]}], "embedding": 1.0},
        {"data": [{"probs": 1.0, "data": 1.0}], "embedding": [[1.0]]},
        {"data": [{"probs": "a", "data": []}], "embedding": "a"},
    ],
)
def test_replies_of_another_shape_are_unreadable(engine: str, reply: Any) -> None:
    """And nothing else is raised, which would end the run."""
    dialect, asked = DIALECTS[engine], np.zeros(1, np.int32)
    labels = dialect.label_logprobs("m", asked, [0], {})
    heads = [dialect.head("m", asked, {"paths": {route: {}}}) for route in ("/classify", "/pooling")]
    for call in (dialect.generate("m", asked, 1), labels, *heads):
        with pytest.raises(UNREADABLE):
            call.read(reply)


def test_both_dialects_are_recorded() -> None:
    found = {(recorded(file)["engine"], call["kind"]) for file in REPLIES for call in recorded(file)["calls"]}
    assert found == {(engine, kind) for engine in DIALECTS for kind in ("generate", "label_logprobs", "head")}


@pytest.mark.parametrize("file", REPLIES, ids=lambda file: file.stem)
def test_the_same_is_still_asked(file: Path, render: Renderer) -> None:
    record = recorded(file)
    for entry, (kind, number, call) in zip(record["calls"], calls_again(record, render), strict=True):
        assert (kind, number, call.path, call.payload) == tuple(
            entry[k] for k in ("kind", "question", "path", "payload")
        )


@pytest.mark.parametrize("file", [file for file in REPLIES if "head" not in file.stem], ids=lambda file: file.stem)
def test_replies_are_read_as_what_the_model_computes(file: Path, render: Renderer, in_process: InProcessModel) -> None:
    record = recorded(file)
    expected = in_process.label_logprobs(QUESTIONS, LABELS)
    texts = in_process.generate(QUESTIONS, MAX_TOKENS)
    for entry, (kind, number, call) in zip(record["calls"], calls_again(record, render), strict=True):
        found = call.read(entry["reply"])
        if kind == "label_logprobs":
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[number].value, atol=TOLERANCE[record["dtype"]])
        elif record["dtype"] == "float32":
            assert found == texts[number].value
        else:
            assert isinstance(found, str) and found


@pytest.mark.parametrize("file", REPLIES, ids=lambda file: file.stem)
def test_servers_say_what_they_serve(file: Path) -> None:
    record = recorded(file)
    name, weights = DIALECTS[record["engine"]].identity(record["models"]["reply"])
    assert name == record["name"]
    assert weights


BROKEN_OFF = {
    "vllm": {"choices": [{"text": "Unsa", "finish_reason": "abort"}]},
    "sglang": {"text": "Unsa", "meta_info": {"finish_reason": {"type": "abort"}}},
}


@pytest.mark.parametrize("engine", DIALECTS)
def test_an_answer_that_was_broken_off_is_none(engine: str) -> None:
    call = DIALECTS[engine].generate("judge", np.array([1, 2]), 4)
    with pytest.raises(ValueError, match="broken off"):
        call.read(BROKEN_OFF[engine])
