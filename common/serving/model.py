"""What a judge asks of its model, the same for a server and for a model beside the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from common.types import Asked, Missing

T = TypeVar("T")


class Image(NamedTuple):
    """An image in the place where the question has it: a path or URL."""

    source: str


class Question(NamedTuple):
    """One question to a judge: an optional system message and a user turn of texts and images.

    Its texts are plain: a control token spelled in one is never a control token to the judge.
    """

    system: str | None
    user: tuple[str | Image, ...]


class Answer(NamedTuple, Generic[T]):
    """What a model answered, or why it did not, and how the asking went."""

    value: T | Missing
    asked: Asked


class JudgeModel(Protocol):
    """A model that answers questions. `identity` names its weights and chat template: name and revision, or digests.

    Each member returns one answer per question, in order, and may be called from several threads at once.
    """

    identity: str

    def generate(self, questions: Sequence[Question], max_tokens: int) -> list[Answer[str]]:
        """The greedy continuation of each question, up to `max_tokens` tokens, without its stop token."""
        ...

    def label_logprobs(self, questions: Sequence[Question], labels: Sequence[str]) -> list[Answer[np.ndarray]]:
        """float32 [L]: the log-probability of each label's first token as the next one, over the whole vocabulary.

        Raises ConfigError when two labels begin with the same token.
        """
        ...

    def head(self, questions: Sequence[Question]) -> list[Answer[np.ndarray]]:
        """float32 [C]: the outputs of the model's scalar or classification head, without any activation."""
        ...

    def close(self) -> None:
        """Release what the model holds."""
        ...


class LocalJudge(Protocol):
    """A frozen model beside the trainer that judges ask: a causal language model, or one with a scalar or class head.

    Prompts are int32 [T] each, of any lengths, computed side by side. A question brings resting weights back.
    """

    def next_logprobs(self, prompts: Sequence[np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [N L]: the log-probability of each of L tokens as the next one, over the whole vocabulary."""
        ...

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int, stop_ids: tuple[int, ...]) -> list[np.ndarray]:
        """The greedy continuation of each prompt: int32 [<= max_tokens], a stop token included."""
        ...

    def head(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N C]: the outputs of the head at each prompt's last token, without any activation."""
        ...

    def rest(self) -> None:
        """Move the weights to host memory until the next question."""
        ...
