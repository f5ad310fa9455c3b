"""What differs between kinds of servers: how a question is sent, and where the answer stands in the reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.serving.http import Call


class Seen(NamedTuple):
    """A question with images, for servers that prepare images themselves.

    turns: chat messages with a list of parts as OpenAI's API has them, images as URLs. text: the same through the chat
    template, with the template's own marks where images stand, for a server whose tokenizer puts tokens around any
    text; None where there is none (Chat.render_images, Chat.without_added). Control tokens spelled in either are broken
    by a space.
    """

    turns: list[dict[str, Any]]
    text: str | None
    images: list[str]


def sound_text(text: Any) -> str:
    """A reply's text. Raises TypeError for what is none, ValueError for what no file could hold."""
    if not isinstance(text, str):
        raise TypeError("the text is none")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError("the text holds half a character")
    return text


def sound_outputs(values: Any) -> np.ndarray:
    """A reply's outputs of a head: float32 [C]. Raises TypeError for what is no list of numbers."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise TypeError("the outputs are no list of numbers")
    return np.array(values, np.float32)


Rendered = np.ndarray | Seen  # token ids int32 [T], or a question with images


class Dialect(Protocol):
    """A server's HTTP routes. `name` is what the server calls its model."""

    @property
    def MODELS(self) -> str:
        """The route that says what is served."""
        ...

    @property
    def API(self) -> str:
        """The route that describes all others."""
        ...

    def identity(self, reply: Any) -> tuple[str, str]:
        """From the reply to a GET of MODELS: the model's served name; the folder, name or version of its weights."""
        ...

    def generate(self, name: str, question: Rendered, max_tokens: int) -> Call:
        """A greedy continuation; read as its text."""
        ...

    def label_logprobs(self, name: str, question: Rendered, label_ids: Sequence[int], api: Any) -> Call:
        """The logprobs of given tokens as the next one, over the whole vocabulary; read as float32 [L]. api: the reply
        to a GET of API, which says what this version of the server can be asked.
        """
        ...

    def head(self, name: str, question: Rendered, api: Any) -> Call:
        """The raw outputs of a scalar or classification head; read as float32 [C]. api: as above."""
        ...
