"""Chat templates and tokenizers: messages -> token ids, response token ids -> text and spans.

Frames come from the model's own template; what people and models wrote is always plain text. A control token spelled
inside a message stays text, whatever the template does with it, and nothing is added after the template.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from common.config.section import ConfigError
from common.types import FinishReason, Message, Rollout, Span, Transcript

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# One of these splits a control token that a message spells out, so that the template's own ones stand alone; it is
# taken out again before the text is encoded. Private use: no tokenizer or template gives them a meaning.
_BREAKS = [chr(code) for code in range(0xE000, 0xF900)]
_PIECES = 64  # texts between control tokens whose ids are kept
_CONTROL_STYLE = re.compile(r"<[|｜].+[|｜]>")
_REPLACEMENT = "\ufffd"  # what a character decodes to until its last token is there

_PROBE = (Message("user", "What is 1 + 1?"), Message("assistant", "Two."), Message("user", " And\n\n2 + 2?"))


class Chat:
    """The tokenizer of a model folder with its chat template.

    `digest` stands for vocabulary and template: two chats with the same one read and write alike.

    Raises ConfigError when the folder holds no tokenizer, or one without a chat template that it can be used with.
    """

    def __init__(self, folder: Path, system: str | None = None) -> None:
        # Or else transformers tells every user of the JAX engine that PyTorch was not found.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # late: importing it takes seconds and most commands never tokenize

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"model folder {folder}: no usable tokenizer ({str(error).splitlines()[0]})") from None
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"model folder {folder}: the tokenizer has no chat template. Use an instruct or chat model."
            )
        self._system = system
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._control = self._control_tokens()
        self.stop_ids = self._stop_ids(folder)
        # A frame and its system turn come again with every prompt.
        self._encode_piece = lru_cache(_PIECES)(self._encode_text)
        self._check_pieces(folder)
        rules = json.dumps([sorted(self.vocabulary.items()), self._tokenizer.chat_template])
        self.digest = hashlib.sha256(rules.encode()).hexdigest()[:12]

    def _control_tokens(self) -> re.Pattern[str]:
        """The tokens that frames are made of: those marked special, those of the template, <|…|>, and think markers.

        Some models leave the role tokens of their own template unmarked (DeepSeek-R1); they are marked here, or else
        the tokenizer would read them out of a message.
        """
        template = str(self._tokenizer.chat_template)
        control = [
            token
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special
            or token.content in (THINK_OPEN, THINK_CLOSE)
            or (token.content.strip() and token.content in template)
            or _CONTROL_STYLE.fullmatch(token.content)
        ]
        for token in control:
            token.special = True
        self._tokenizer.add_tokens(control, special_tokens=True)
        longest_first = sorted((token.content for token in control), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _stop_ids(self, folder: Path) -> tuple[int, ...]:
        """End tokens: the tokenizer's and those that generation_config.json lists."""
        from transformers import GenerationConfig

        ids = {self._tokenizer.eos_token_id}
        if (folder / "generation_config.json").exists():
            try:
                listed = GenerationConfig.from_pretrained(folder).eos_token_id
                ids |= {
                    index(token) for token in (listed if isinstance(listed, list) else [listed]) if token is not None
                }
            except (OSError, ValueError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"model folder {folder}: no usable generation_config.json ({reason})") from None
        return tuple(sorted(token for token in ids if token is not None))

    def _check_pieces(self, folder: Path) -> None:
        """Some tokenizers read a text differently after a control token than alone; their prompts would be off."""
        # Some templates want a system turn, and some refuse one.
        system = [] if self._system is None else [Message("system", "Be brief.")]
        turns = [message._asdict() for message in (*system, *_PROBE)]
        pieces = self._encode(self.render(turns))
        if pieces != self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False):
            raise ConfigError(
                f"model folder {folder}: its tokenizer joins text and control tokens (it strips or adds spaces there), "
                "which is not supported. Use a model with a byte-level tokenizer."
            )

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The whole prompt, up to where the assistant's answer begins: int32 [T]."""
        turns, mark = self._broken_turns(messages)
        return np.asarray(self._encode(self.render(turns), mark), np.int32)

    def opens_reasoning(self, messages: Sequence[Message]) -> bool:
        """Whether the template itself opens the think block, so that responses start inside it (DeepSeek-R1, QwQ)."""
        turns, _ = self._broken_turns(messages)
        return self.render(turns).rstrip().endswith(THINK_OPEN)

    def _broken_turns(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], str]:
        """The template's input, control tokens that messages spell out broken; and the mark that breaks them."""
        if self._system is not None and messages[0].role != "system":
            messages = [Message("system", self._system), *messages]
        mark = next(mark for mark in _BREAKS if not any(mark in message.content for message in messages))

        def broken(role: str, content: str) -> str:
            # The assistant's own think markers are real: templates look for them, and the policy sampled them.
            kept = (THINK_OPEN, THINK_CLOSE) if role == "assistant" else ()
            return self._control.sub(
                lambda match: match[0] if match[0] in kept else f"{match[0][0]}{mark}{match[0][1:]}", content
            )

        return [{"role": role, "content": broken(role, content)} for role, content in messages], mark

    def broken(self, text: str) -> str:
        """The text with a space inside every control token that it spells, for servers that read tokens out of text."""
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def render_images(self, turns: Sequence[dict[str, Any]]) -> str | None:
        """As `render`, of turns whose content may be a list of texts and images; None for a template of texts alone."""
        return self.render(turns) if self._renders_images else None

    @cached_property
    def _renders_images(self) -> bool:
        sample = [{"type": "text", "text": "?"}, {"type": "image"}]
        try:
            one, two = (self.render([{"role": "user", "content": content}]) for content in (sample, sample * 2))
        except (ConfigError, TypeError):
            return False
        return "'type'" not in one and one != two  # some print the list itself

    def without_added(self, text: str) -> str | None:
        """A rendered text less what the tokenizer puts around any text by itself (a first bos), for servers that let it
        do so. None when it puts there what the template does not, so that no text would be read as this one.
        """
        meant = self._tokenizer.encode(text, add_special_tokens=False)
        candidates = (text, text.removeprefix(self._tokenizer.bos_token or ""))
        return next((sent for sent in candidates if self._tokenizer.encode(sent) == meant), None)

    def render(self, turns: Sequence[dict[str, Any]]) -> str:
        """The template's text of turns {"role", "content"}, up to where the assistant's answer begins.

        Raises ConfigError when the template refuses them.
        """
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ConfigError(
                f"the model's chat template refuses a conversation of turns {roles} ({error}). Change the turns, or "
                "model.system if the system turn is the problem."
            ) from None

    def _encode(self, text: str, mark: str = "") -> list[int]:
        """Token ids of a rendered text, in which each unbroken control token belongs to the frame."""
        ids, last = [], 0
        for match in self._control.finditer(text):
            ids += self._encode_piece(text[last : match.start()].replace(mark, ""))
            ids.append(self.vocabulary[match[0]])
            last = match.end()
        return ids + self._encode_piece(text[last:].replace(mark, ""))

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def first_tokens(self, labels: Sequence[str]) -> list[int]:
        """The first token of each label. Raises ConfigError when two labels begin with the same one."""
        first = [self._encode_text(label)[0] for label in labels]
        for place, token in enumerate(first):
            if token in first[:place]:
                raise ConfigError(
                    f"the labels {labels[first.index(token)]!r} and {labels[place]!r} begin with the same token of the "
                    "judge's model, so their probabilities cannot be told apart. Choose other words."
                )
        return first

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of response tokens, control tokens included, spaces as they are."""
        ids = [int(token) for token in token_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def rollout(
        self,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        finish_reason: FinishReason,
        policy_version: int,
        opened: bool,
    ) -> Rollout:
        """A sampled response with its text and spans. token_ids int32 [T], logprobs float32 [T].

        `opened` says that the prompt already opened the think block.
        """
        body = token_ids[:-1] if finish_reason == "stop" else token_ids
        text = self.decode(body)
        block, after = _think_block(text, opened)
        return Rollout(
            token_ids=token_ids,
            sampled=np.ones(len(token_ids), bool),
            logprobs=logprobs,
            text=text,
            reasoning_text=None if block is None else text[slice(*block)],
            answer_text=text[after:],
            reasoning=None if block is None else self._span(body, text, *block),
            answer=self._span(body, text, after, len(text)),
            finish_reason=finish_reason,
            policy_version=policy_version,
        )

    def _span(self, token_ids: np.ndarray, text: str, start: int, end: int) -> Span:
        """Token offsets of the smallest run of tokens that holds characters start to end of their text."""

        def begun(count: int) -> int:
            return len(self.decode(token_ids[:count]))

        def complete(count: int) -> int:
            prefix = self.decode(token_ids[:count])
            return len(prefix) if text.startswith(prefix) else len(prefix.rstrip(_REPLACEMENT))

        counts = range(len(token_ids) + 1)
        first = bisect_right(counts, start, key=begun) - 1
        last = len(token_ids) if end == len(text) else bisect_left(counts, end, key=complete)
        return Span(first, max(first, last))


def transcript(text: str, opened: bool, token_ids: np.ndarray | None = None) -> Transcript:
    """A response that nobody sampled here, in the parts that it would have as a rollout. token_ids: int32 [T].

    `opened` says that the prompt already opened the think block.
    """
    block, after = _think_block(text, opened)
    return Transcript(text, None if block is None else text[slice(*block)], text[after:], token_ids)


def _think_block(text: str, opened: bool) -> tuple[tuple[int, int] | None, int]:
    """The character range of a response's reasoning, and where its answer begins.

    Without a closed block there is no range, and an answer begins at once where no block was opened, and nowhere where
    one was never closed.
    """
    start = 0
    if not opened:
        stripped = text.lstrip()
        if not stripped.startswith(THINK_OPEN):
            return None, 0
        start = len(text) - len(stripped) + len(THINK_OPEN)
    end = text.find(THINK_CLOSE, start)
    return (None, len(text)) if end < 0 else ((start, end), end + len(THINK_CLOSE))
