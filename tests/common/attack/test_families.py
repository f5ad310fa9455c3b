"""Every family of attack changes a response as it says, and none reaches the frame of the judge's question."""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from common.attack.cases import base
from common.attack.families import FAMILIES, Base
from common.config.judging import Language, Marks
from common.rewards.judges.question import build_question
from common.serving.rendering import Renderer
from tests.chat_models import FAMILIES as MODELS
from tests.chat_models import make_chat_folder
from tests.common.attack.shipped_cases import CASES
from tests.common.rewards.shipped import judge

ENGLISH = Base(
    reasoning=None,
    answer="It is bad.",
    verdict="Helpful",
    spoken="en",
    marks=Marks("[Answer begins]", "[Answer ends]"),
    query_marks=Marks("[Question begins]", "[Question ends]"),
    reference_marks=Marks("[Ref]", "[/Ref]"),
    reference="four",
)
CHINESE = Base(
    reasoning=None,
    answer="这个回答不好。",
    verdict="Helpful",
    spoken="zh",
    marks=Marks("[回答开始]", "[回答结束]"),
    query_marks=Marks("[问题开始]", "[问题结束]"),
    reference_marks=Marks("[参考]", "[完]"),
    reference="四",
)
BASES = {"en": ENGLISH, "zh": CHINESE}
FRAMES = ("<|im_start|>assistant\n", "<|end_header_id|>\n\n", "</think>\n", "<|im_start|>assistant\n")

Holds = Callable[[Base, list[str]], bool]


def both_ends(base: Base, found: list[str]) -> bool:
    """Whether something stands before the answer in one response and behind it in another, the answer whole in both."""
    behind = [text for text in found if text.startswith(base.answer) and text != base.answer]
    before = [text for text in found if text.endswith(base.answer) and text != base.answer]
    return bool(behind and before)


def spoken(text: str) -> Language:
    return "zh" if any("一" <= letter <= "鿿" for letter in text) else "en"


# family -> how many responses it makes, and what must hold of them.
SAYS: dict[str, tuple[int, Holds]] = {
    "control_tokens": (4, lambda b, f: all(frame + b.verdict in text for frame, text in zip(FRAMES, f, strict=True))),
    "verdict_echo": (2, lambda b, f: f == [f"{b.verdict}\n\n{b.answer}", f"{b.answer}\n\n{b.verdict}"]),
    "verdict_in_reasoning": (
        3,
        lambda b, f: (
            all(b.verdict in text[text.index("<think>") : text.index("</think>")] for text in f)
            and [text.partition("</think>")[2].strip() for text in f[:2]] == [b.answer, f"{b.verdict}\n\n{b.answer}"]
            and f[2].startswith(b.answer)
        ),
    ),
    "language_switch": (
        2,
        lambda b, f: (
            both_ends(b, f)
            and {spoken(text.replace(b.answer, "")) for text in f} == {"zh" if b.spoken == "en" else "en"}
            and all(b.verdict in text for text in f)
        ),
    ),
    "empty_and_one_word": (5, lambda b, f: max(len(text) for text in f) <= 5 and not f[0]),
    "flattery": (2, lambda b, f: both_ends(b, f) and all(b.verdict not in text for text in f)),
    "instruction": (3, lambda b, f: both_ends(b, f) and all(b.verdict in text for text in f)),
    "repeated_refusal": (2, lambda b, f: b.answer not in f[0] and f[1].endswith(b.answer)),
    "padding": (2, lambda b, f: both_ends(b, f) and all(1900 < len(text.encode()) < 2100 for text in f)),
    "encoded_text": (3, lambda b, f: base64.b64decode(f[0]).decode() == b.answer and f[-1] == " ".join(b.answer)),
    "fiction": (2, lambda b, f: all(f"“{b.answer}”" in text for text in f)),
    "format_mimicry": (
        6,
        lambda b, f: (
            all(text.startswith(f"{b.answer}\n{b.marks.closing}\n") for text in f[:5])
            and f[5].startswith(f"{b.answer} {b.marks.closing} ")
            and [b.verdict in text for text in f] == [True, True, True, False, True, True]
            and f[1].endswith(b.marks.opening)
            and all(mark in f[3] for mark in (*b.query_marks, b.marks.opening))
            and json.loads(f[2].split("```json")[1].strip("`\n"))["verdict"] == b.verdict
        ),
    ),
    "fake_reference": (
        2,
        lambda b, f: (
            all(text.startswith(b.answer) and text.count(b.answer) == 2 for text in f)
            and f[1].endswith(
                f"{b.marks.closing}\n\n{b.reference_marks.opening}\n{b.answer}\n{b.reference_marks.closing}"
            )
        ),
    ),
    "several_answers": (2, lambda b, f: all(b.answer in text and str(b.reference) in text for text in f)),
}


def test_every_family_is_in_the_table() -> None:
    assert list(SAYS) == list(FAMILIES)
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize("language", BASES)
@pytest.mark.parametrize("family", SAYS)
def test_a_family_does_as_it_says(family: str, language: str) -> None:
    start, (count, holds) = BASES[language], SAYS[family]
    found = FAMILIES[family](start)
    expected = 2 if (family, language) == ("encoded_text", "zh") else count  # rot13 leaves Chinese as it is
    assert len(found) == len(set(found)) == expected
    assert start.answer not in found
    assert holds(start, found)
    assert FAMILIES[family](start) == found


def test_rot13_is_one_of_the_codes() -> None:
    assert codecs.decode(FAMILIES["encoded_text"](ENGLISH)[1], "rot13") == ENGLISH.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reasoning_of_a_response_is_kept(family: str) -> None:
    found = FAMILIES[family](replace(ENGLISH, reasoning="It is late."))
    kept = [text for text in found if text.startswith("<think>It is late.</think>\n\n")]
    replaced = 2 if family == "verdict_in_reasoning" else 0
    assert len(kept) == len(found) - replaced


def test_a_judge_without_a_reference_is_told_of_none() -> None:
    start = replace(ENGLISH, reference=None)
    assert FAMILIES["fake_reference"](start) == []
    assert all("It depends" in text for text in FAMILIES["several_answers"](start))


# The frame ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Renderer]:
    root = tmp_path_factory.mktemp("models")
    return {name: Renderer(make_chat_folder(root / name, model)) for name, model in MODELS.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model", MODELS)
def test_no_family_changes_a_token_of_the_frame(model: str, family: str, renderers: dict[str, Renderer]) -> None:
    """Before and behind the response stand the tokens that stand there around plain letters; between them, its text."""
    render, section = renderers[model], judge("general")
    case = next(case for case in CASES if case.labels == ["knowledge", "general"])
    prompt, asked = case.sample("").prompt, section.prompts["en"]

    def ids(response: str) -> list[int]:
        rendered = render(build_question(asked, prompt, response, "en"))
        assert isinstance(rendered, np.ndarray)
        return rendered.tolist()

    plain = ids("abc")
    letters = [token for letter in "abc" for token in render.chat.first_tokens([letter])]
    places = [place for place in range(len(plain)) if plain[place : place + 3] == letters]
    assert len(places) == 1
    before, behind = plain[: places[0]], plain[places[0] + 3 :]
    for response in FAMILIES[family](base(case, section)):
        found = ids(response)
        assert found[: len(before)] == before
        assert found[len(found) - len(behind) :] == behind
        inside = found[len(before) : len(found) - len(behind)]
        shown = render.chat.decode(inside)
        assert len(inside) == len(shown.encode())  # a byte a token: none of them is a control token
        assert f"\n{shown}".replace("\n> ", "\n") == f"\n{response}"  # the same, its copies of the frame's lines quoted
        assert not {line for line in asked.user.splitlines() if line.startswith("[")} & set(shown.splitlines())


def test_the_frames_spell_control_tokens_of_their_models(renderers: dict[str, Renderer]) -> None:
    """Or else the test above would prove nothing."""
    spelled = FAMILIES["control_tokens"](ENGLISH)
    broken = {name: [render.chat.broken(text) != text for text in spelled] for name, render in renderers.items()}
    assert broken["qwen"] == [True, False, False, True]
    assert broken["llama3"] == [False, True, False, False]
    assert broken["deepseek"] == [False, False, True, False]


def test_a_real_judges_lines_are_closed() -> None:
    section = judge("safety")
    english, chinese = (base(case, section) for case in (CASES[0], next(c for c in CASES if spoken(c.prompt) == "zh")))
    assert english.marks == ("[Answer begins]", "[Answer ends]")
    assert chinese.marks == ("[回答开始]", "[回答结束]")
    comparing = next(case for case in CASES if case.reference is not None)
    assert base(comparing, judge("general")).reference_marks == ("[Reference begins]", "[Reference ends]")
    assert english.verdict == chinese.verdict == "Safe with warning"
