"""A sample -> the question that a judge is asked about it, from structured turns and spans, never from decoded text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from common.config.judging import FIELD, FIELDS, Language, PromptSection
from common.data.records import IMAGE
from common.rewards.judges.frame import Frame
from common.rewards.rules import measures
from common.serving.model import Image, Question
from common.types import Message, Prompt

# Raised when a sample's question, or what is read from its answer, changes with the same judge: scores of before are
# then of another one.
FORM = 3
_KEPT = 64
_ROLES = {"en": {"user": "User", "assistant": "Assistant"}, "zh": {"user": "用户", "assistant": "助手"}}


def language(prompt: Prompt) -> Language:
    """`zh` where Chinese characters are most of the last user turn, else `en`."""
    return _language(next((message.content for message in reversed(prompt.messages) if message.role == "user"), ""))


def build_question(section: PromptSection, prompt: Prompt, response: str, spoken: Language) -> Question:
    """The prompt's template with the sample's parts in their places; `spoken` is the language of its role names.

    Fields are filled once: what a question, a response or a reference spells stays as it is, `{reference}` and
    `<image>` too. A line that reads like one of the prompt's own marks, which would end its part there, is quoted. An
    image stands where its prompt has it.
    """
    frame, pieces = _template(section.user)
    parts = {
        "query": lambda: _query(prompt, spoken, frame),
        "response": lambda: [frame.quoted(response)],
        "reference": lambda: [frame.quoted(_reference(prompt.reference))],
    }
    user: list[str | Image] = []
    for index, piece in enumerate(pieces):
        user += parts[piece]() if index % 2 else [piece]
    return Question(section.system, tuple(_joined(user)))


# What all samples of a prompt, or of a judge, have in common is worked out once.
@lru_cache(_KEPT)
def _language(text: str) -> Language:
    return "zh" if measures.language(text, 0.5) == "Chinese" else "en"


@lru_cache(_KEPT)
def _template(user: str) -> tuple[Frame, list[str]]:
    """A prompt's marks; its texts, with the name of a field at every second place."""
    section = PromptSection(user=user)
    marks = (mark for field in FIELDS for marks in section.marks(field) for mark in marks)
    return Frame(marks), FIELD.split(user)


def _query(prompt: Prompt, spoken: Language, frame: Frame) -> Iterator[str | Image]:
    """The conversation without its system message: a single turn's quoted text, or each turn's behind its role."""
    images = iter(prompt.images)
    # Those of the system message are taken with it, or else the next turn would show them in place of its own.
    shown = [(turn, list(_with_images(turn, images, bool(prompt.images)))) for turn in prompt.messages]
    turns = [(turn, parts) for turn, parts in shown if turn.role != "system"]
    for number, (turn, parts) in enumerate(turns):
        if len(turns) > 1:
            yield ("\n" if number else "") + _ROLES[spoken][turn.role] + ": "
        yield from (frame.quoted(part) if isinstance(part, str) else part for part in parts)


def _with_images(turn: Message, images: Iterator[str], any_images: bool) -> Iterator[str | Image]:
    if not any_images:  # then `<image>` in the text is just that
        yield turn.content
        return
    first, *others = turn.content.split(IMAGE)
    yield first
    for text in others:
        yield Image(next(images))
        yield text


def _reference(reference: Any) -> str:
    return reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)


def _joined(parts: list[str | Image]) -> Iterator[str | Image]:
    """Neighbouring texts as one, empty ones left out."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text
