"""One line of a JSONL file -> one Prompt. Two record shapes are read; anything else is an error with file and line.

`{"prompt": [chat messages] | str, "label": ..., "reference": ..., "images": [...], "extra_info": {...}}` and
`{"conversations": [{"from": "human" | "gpt" | "system", "value": ...}], "images": [...], "label": ...}`. All turns are
kept; in a conversation that ends with an answer, the answer is the reference unless another field gives one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.config.section import ConfigError
from common.types import Message, Prompt

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE = "<image>"


class BadRecord(ValueError):
    """A record that cannot be used; the message says why, without file and line."""


def read_records(path: Path, reference_key: str | None) -> Iterator[Prompt | BadRecord]:
    """Every record of a file in order, bad ones as BadRecord with file, line and reason. Blank lines are skipped.

    Raises ConfigError when the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"data file {path.absolute()}: cannot be read ({reason}). Correct the path in the data section, or start "
            "in the folder that it is relative to."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield parse_prompt(parse_line(line), f"{path.stem}-{number}", reference_key)
        except BadRecord as error:
            yield BadRecord(f"{path}:{number}: {error}")


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadRecord."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError alike; lists in lists
        raise BadRecord(f"not valid JSON ({error}). Write one JSON object a line, in UTF-8.") from None
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # UnicodeEncodeError too
        raise BadRecord(
            f"holds a number or a character that no UTF-8 JSON file can carry ({error}). Mend it."
        ) from None
    if not isinstance(record, dict):
        raise BadRecord(f"is a JSON {type(record).__name__}, not an object. Write one JSON object a line.")
    return record


def parse_prompt(record: dict[str, Any], default_id: str, reference_key: str | None) -> Prompt:
    """The prompt of a record in either shape. Raises BadRecord."""
    messages = _messages(record)
    answer = None
    if messages[-1].role == "assistant":
        *messages, last = messages
        answer = last.content
    if not messages or messages[-1].role != "user":
        raise BadRecord("the conversation has no user turn to answer. End it with a user turn.")
    images = _images(record, messages)
    return Prompt(
        id=default_id if record.get("id") is None else str(record["id"]),
        label=_label(record),
        messages=tuple(messages),
        reference=_reference(record, reference_key, answer),
        images=images,
    )


def _messages(record: dict[str, Any]) -> list[Message]:
    if "prompt" in record:
        turns = record["prompt"]
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        return parse_turns(turns, "prompt", "role", "content")
    if "conversations" in record:
        return parse_turns(record["conversations"], "conversations", "from", "value")
    raise BadRecord(f"has neither 'prompt' nor 'conversations'; its fields are {', '.join(sorted(record)) or 'none'}.")


def parse_turns(turns: Any, field: str, role_key: str, content_key: str) -> list[Message]:
    """The turns that stand in a field. Raises BadRecord."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{field!r} must be a non-empty list of turns.")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or str(turn.get(role_key)) not in ROLES:
            raise BadRecord(f"{field}[{index}].{role_key} must be one of {', '.join(ROLES)}.")
        if not isinstance(turn.get(content_key), str):
            raise BadRecord(f"{field}[{index}].{content_key} must be a string.")
        messages.append(Message(ROLES[turn[role_key]], turn[content_key]))
    return messages


def given_label(record: dict[str, Any]) -> Any:
    """What a record gives as its label, None where it gives none."""
    label, extra = record.get("label"), record.get("extra_info")
    return extra.get("label") if label is None and isinstance(extra, dict) else label


def _label(record: dict[str, Any]) -> str:
    label = given_label(record)
    if not isinstance(label, str) or not label:
        raise BadRecord("has no 'label' (a string, at top level or in extra_info); the reward recipe needs it.")
    return label


def _images(record: dict[str, Any], messages: list[Message]) -> tuple[str, ...]:
    images = record.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadRecord("'images' must be a list of paths or URLs.")
    if images or "images" in record:
        check_markers(images, messages)
    return tuple(images)


def check_markers(images: Sequence[str], messages: Sequence[Message]) -> None:
    """Raise BadRecord when the texts do not have one marker for each image."""
    markers = sum(message.content.count(IMAGE) for message in messages)
    if markers != len(images):
        raise BadRecord(f"has {len(images)} images but {markers} {IMAGE} markers. Give each image its marker.")


def _reference(record: dict[str, Any], key: str | None, answer: str | None) -> Any:
    """The first of: the configured field, `reference`, `chosen`, reward_model.ground_truth, ground_truth,
    extra_info.constraints, the conversation's own last answer."""
    if key is not None:
        if key not in record:
            raise BadRecord(f"has no field {key!r} (data.reference_key).")
        return record[key]
    model, extra = record.get("reward_model"), record.get("extra_info")
    places = (
        record.get("reference"),
        record.get("chosen"),
        model.get("ground_truth") if isinstance(model, dict) else None,
        record.get("ground_truth"),
        extra.get("constraints") if isinstance(extra, dict) else None,
        answer,
    )
    return next((place for place in places if place is not None), None)
