"""Chat templates and tokenizers: messages -> token ids, response token ids -> text and spans.

Frames come from the model's own template; what people and models wrote is always plain text. A control token spelled
inside a message stays text, whatever the template does with it, and nothing is added after the template.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.config.section import ConfigError
from common.types import FinishReason, Message, Rollout, Span

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# Splits a control token that a message spells out, so that the template's own ones stand alone; taken out again
# before the text is encoded. U+E000 is private use: no tokenizer or template gives it a meaning.
_BREAK = "\ue000"


class Chat:
    """The tokenizer of a model folder with its chat template.

    Raises ConfigError when the folder holds no tokenizer or the tokenizer no chat template.
    """

    def __init__(self, folder: Path, system: str | None = None) -> None:
        from transformers import AutoTokenizer  # late: importing it takes seconds and most commands never tokenize

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model folder {folder}: no usable tokenizer ({str(error).splitlines()[0]})") from None
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"model folder {folder}: the tokenizer has no chat template. Use an instruct or chat model."
            )
        self._system = system
        self._control = re.compile("|".join(map(re.escape, sorted(self._tokenizer.all_special_tokens, key=len)[::-1])))
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.stop_ids = self._stop_ids(folder)

    def _stop_ids(self, folder: Path) -> tuple[int, ...]:
        """End tokens: the tokenizer's and those that generation_config.json lists."""
        from transformers import GenerationConfig

        ids = {self._tokenizer.eos_token_id}
        if (folder / "generation_config.json").exists():
            listed = GenerationConfig.from_pretrained(folder).eos_token_id
            ids |= set(listed) if isinstance(listed, list) else {listed}
        return tuple(sorted(token for token in ids if token is not None))

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The whole prompt, up to where the assistant's answer begins: int32 [T]."""
        text = self.render(messages)
        pieces, last = [], 0
        for match in self._control.finditer(text):
            pieces += self._encode_text(text[last : match.start()])
            pieces.append(self.vocabulary[match.group()])
            last = match.end()
        pieces += self._encode_text(text[last:])
        return np.asarray(pieces, np.int32)

    def render(self, messages: Sequence[Message]) -> str:
        """The template's text, control tokens inside messages broken so that only the frame's own match."""
        turns = [{"role": message.role, "content": self._break_control(message.content)} for message in messages]
        if self._system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._break_control(self._system)})
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _break_control(self, text: str) -> str:
        text = text.replace(_BREAK, "")
        return self._control.sub(lambda match: match.group()[0] + _BREAK + match.group()[1:], text)

    def _encode_text(self, text: str) -> list[int]:
        text = text.replace(_BREAK, "")
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def opens_reasoning(self, messages: Sequence[Message]) -> bool:
        """Whether the template itself opens the think block, so that responses start inside it (DeepSeek-R1, QwQ)."""
        return self.render(messages).rstrip().endswith(THINK_OPEN)

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
        body = token_ids[:-1] if finish_reason == "stop" and int(token_ids[-1]) in self.stop_ids else token_ids
        text = self.decode(body)
        start, end = self._reasoning_bounds(text, opened)
        reasoning = None if end is None else self._span(body, start, end)
        after = 0 if end is None else end + len(THINK_CLOSE)
        return Rollout(
            token_ids=token_ids,
            sampled=np.ones(len(token_ids), bool),
            logprobs=logprobs,
            text=text,
            reasoning_text=None if end is None else text[start:end],
            answer_text=text[after:],
            reasoning=reasoning,
            answer=self._span(body, after, len(text)),
            finish_reason=finish_reason,
            policy_version=policy_version,
        )

    @staticmethod
    def _reasoning_bounds(text: str, opened: bool) -> tuple[int, int | None]:
        """Character range of the think block's content; the end is None when there is no closed block."""
        start = 0
        if not opened:
            stripped = text.lstrip()
            if not stripped.startswith(THINK_OPEN):
                return 0, None
            start = len(text) - len(stripped) + len(THINK_OPEN)
        end = text.find(THINK_CLOSE, start)
        return start, None if end < 0 else end

    def _span(self, token_ids: np.ndarray, start: int, end: int) -> Span:
        """Token offsets of the smallest run of tokens that covers characters start to end."""

        def text_length(count: int) -> int:
            return len(self.decode(token_ids[:count]))

        counts = range(len(token_ids) + 1)
        first = max(0, bisect_right(counts, start, key=text_length) - 1)
        return Span(first, max(first, min(len(token_ids), bisect_left(counts, end, key=text_length))))
