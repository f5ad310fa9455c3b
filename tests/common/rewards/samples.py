"""Samples from plain strings, split into reasoning and answer as the sampler splits them."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.types import FinishReason, Message, Prompt, Rollout, Sample, Span


def prompt(reference: Any = None, question: str = "What is it?", label: str = "test") -> Prompt:
    return Prompt(
        "p1", label, (Message("system", "Think in <think>...</think>."), Message("user", question)), reference
    )


def rollout(
    text: str, num_tokens: int | None = None, finish_reason: FinishReason = "stop", opened: bool = False
) -> Rollout:
    """One token a character, unless `num_tokens` says otherwise. opened: the prompt has opened a think block."""
    head, closed, tail = text.partition("</think>")
    reasoning = head.lstrip().removeprefix("<think>") if closed else None
    answer = tail if closed else "" if opened or head.lstrip().startswith("<think>") else text
    length = len(text) if num_tokens is None else num_tokens
    split = min(len(text) - len(answer), length)
    return Rollout(
        token_ids=np.zeros(length, np.int32),
        sampled=np.ones(length, bool),
        logprobs=np.zeros(length, np.float32),
        text=text,
        reasoning_text=reasoning,
        answer_text=answer,
        reasoning=Span(0, split) if closed else None,
        answer=Span(split, length),
        finish_reason=finish_reason,
        policy_version=0,
    )


def sample(
    text: str,
    reference: Any = None,
    question: str = "What is it?",
    num_tokens: int | None = None,
    finish_reason: FinishReason = "stop",
    opened: bool = False,
) -> Sample:
    return Sample(prompt(reference, question), rollout(text, num_tokens, finish_reason, opened))
