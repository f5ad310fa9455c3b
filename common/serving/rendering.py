"""A question -> what a model reads, through the chat template of that model's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config.section import ConfigError
from common.data.chat import Chat
from common.data.images import image_url
from common.serving.dialect import Rendered, Seen
from common.serving.model import Image, Question
from common.types import Message


class Renderer:
    """Questions for one model. Texts become token ids, so that nothing in them can be a control token; questions with
    images become chat turns, whose texts have control tokens broken by a space.
    """

    def __init__(self, folder: Path) -> None:
        self.chat = Chat(folder)

    def __call__(self, question: Question) -> Rendered:
        """Token ids int32 [T], or turns with images. Raises ConfigError when an image cannot be read."""
        if any(isinstance(part, Image) for part in question.user):
            return self._seen(question)
        system = [] if question.system is None else [Message("system", question.system)]
        user = Message("user", "".join(str(part) for part in question.user))
        return self.chat.encode_prompt([*system, user])

    def _seen(self, question: Question) -> Seen:
        parts: list[dict[str, Any]] = []
        for part in question.user:
            if isinstance(part, Image):
                parts.append({"type": "image_url", "image_url": {"url": image_url(part.source)}})
            else:
                parts.append({"type": "text", "text": self.chat.broken(part)})
        turns: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if question.system is not None:
            turns.insert(0, {"role": "system", "content": self.chat.broken(question.system)})
        marked = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        text = self.chat.render_images([*turns[:-1], {"role": "user", "content": marked}])
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        return Seen(turns, None if text is None else self.chat.without_added(text), images)

    def refuse_reasoning(self) -> None:
        """Raise ConfigError for a chat template that opens a think block: what a judge thinks would be read as its
        answer.
        """
        if self.chat.opens_reasoning([Message("user", "?")]):
            raise ConfigError(
                "the chat template of a judge's model opens a think block, whose beginning would be taken for the "
                "answer. Choose a model without, or give its folder a template that leaves the block to the model."
            )
