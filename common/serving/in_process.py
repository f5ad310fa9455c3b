"""A judge's model beside the trainer, on its own engine: no server, the same questions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config.section import ConfigError
from common.config.servers import ServerSection
from common.data.model_config import context_length, is_classifier, read_model_config
from common.data.model_folder import judge_folder
from common.data.model_weights import weights_digest
from common.serving.model import Answer, LocalJudge, Question
from common.serving.rendering import Renderer
from common.types import Asked, Missing

OpenJudge = Callable[[Path], LocalJudge]

# One model at a time: while transformers builds one, it changes what every thread's new tensors are.
_OPENING = threading.Lock()


def unopened(folder: Path) -> LocalJudge:
    """For commands that check judges and ask them nothing, and so need no engine."""
    raise AssertionError(f"the judge's model in {folder} is only checked here")


class InProcessModel:
    """A JudgeModel on the trainer's engine, opened when it is first asked; one batch of questions at a time.

    Raises ConfigError, without the setting's name, when the folder holds no model that the engines compute, or a
    question needs what the model does not have: a head, a vocabulary, or eyes.
    """

    def __init__(self, section: ServerSection, open_judge: OpenJudge, numbers: str) -> None:
        self._section, self._open_judge = section, open_judge
        self._folder = judge_folder(section.model, section.head)
        self._render = Renderer(self._folder)
        hf = read_model_config(self._folder)
        self._has_head, self._longest = is_classifier(hf), context_length(hf)
        digest = weights_digest(self._folder)[:12]
        self.identity = f"{section.model}, weights {digest} in {numbers}, template {self._render.chat.digest}"
        self._lock = threading.Lock()
        self._opened: LocalJudge | None = None

    def close(self) -> None:
        """Let go of the weights."""
        self._opened = None

    def generate(self, questions: Sequence[Question], max_tokens: int) -> list[Answer[str]]:
        """See JudgeModel."""
        self._refuse(self._has_head, "has a classification head and cannot write. Use a read-out of classes or scalar.")
        self._render.refuse_reasoning()
        stop_ids = self._render.chat.stop_ids

        def ask(model: LocalJudge, prompts: list[np.ndarray]) -> list[str]:
            written = model.generate(prompts, max_tokens, stop_ids)
            return [self._render.chat.decode(ids[:-1] if int(ids[-1]) in stop_ids else ids) for ids in written]

        return self._ask(questions, ask, max_tokens)

    def label_logprobs(self, questions: Sequence[Question], labels: Sequence[str]) -> list[Answer[np.ndarray]]:
        """See JudgeModel."""
        self._refuse(self._has_head, "has a classification head and no labels. Use a read-out of classes or scalar.")
        self._render.refuse_reasoning()
        label_ids = self._render.chat.first_tokens(labels)
        return self._ask(questions, lambda model, prompts: list(model.next_logprobs(prompts, label_ids)))

    def head(self, questions: Sequence[Question]) -> list[Answer[np.ndarray]]:
        """See JudgeModel."""
        self._refuse(not self._has_head, "has no classification head. Use a read-out of labels, verdict or number.")
        return self._ask(questions, lambda model, prompts: list(model.head(prompts)))

    def _refuse(self, unfit: bool, problem: str) -> None:
        if unfit:
            raise ConfigError(f"the judge's model {self._section.model}: {problem}")

    def _ask(
        self,
        questions: Sequence[Question],
        ask: Callable[[LocalJudge, list[np.ndarray]], list[Any]],
        max_tokens: int = 0,
    ) -> list[Answer[Any]]:
        prompts = [self._token_ids(question) for question in questions]
        limit = self._longest - max_tokens
        found = iter(self._answers([prompt for prompt in prompts if len(prompt) <= limit], ask))
        return [next(found) if len(prompt) <= limit else self._too_long(len(prompt), limit) for prompt in prompts]

    def _too_long(self, length: int, limit: float) -> Answer[Any]:
        problem = f"the question has {length} tokens, and the judge's model has room for {limit}"
        return Answer(Missing(problem), Asked(self.identity, 0.0, 0.0, cached=False))

    def _answers(
        self, prompts: list[np.ndarray], ask: Callable[[LocalJudge, list[np.ndarray]], list[Any]]
    ) -> list[Answer[Any]]:
        if not prompts:
            return []
        queued_at = time.monotonic()
        with self._lock:
            started_at = time.monotonic()
            if self._opened is None:
                with _OPENING:
                    self._opened = self._open_judge(self._folder)
            found = self._in_rows(self._opened, prompts, ask)
            if self._section.rests_in == "host":
                self._opened.rest()
        # All of a batch are answered at once: what each waited is what the batch took.
        asked = Asked(self.identity, started_at - queued_at, time.monotonic() - started_at, cached=False)
        return [Answer(value, asked) for value in found]

    def _in_rows(
        self, model: LocalJudge, prompts: list[np.ndarray], ask: Callable[[LocalJudge, list[np.ndarray]], list[Any]]
    ) -> list[Any]:
        """Answers in the order of the prompts, which are asked by length, so that little is padded."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Any] = {}
        for start in range(0, len(order), self._section.rows):
            chosen = order[start : start + self._section.rows]
            found |= zip(chosen, ask(model, [prompts[index] for index in chosen]), strict=True)
        return [found[index] for index in range(len(prompts))]

    def _token_ids(self, question: Question) -> np.ndarray:
        rendered = self._render(question)
        if not isinstance(rendered, np.ndarray):
            raise ConfigError(
                f"the judge's model {self._section.model} reads text only here. Serve it with vllm or sglang."
            )
        return rendered
