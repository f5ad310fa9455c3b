"""A JudgeModel whose answers are kept: the same question to the same model is asked once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.data.images import image_url
from common.serving.answer_cache import AnswerCache
from common.serving.model import Answer, Image, JudgeModel, Question
from common.types import Asked, Missing

_REQUESTS = 3  # raised when what servers are sent for a question changes: answers of before are then asked again


class CachedModel:
    """Asks `model` what the cache does not hold.

    The key of an answer is the model's identity (weights, template and how it is served), the kind of answer with its
    decoding, and the question's texts and image bytes. What is missing is not kept, so that it is asked again; nor is
    an answer about images on the web, where other bytes may come to stand behind an address.
    """

    def __init__(self, model: JudgeModel, cache: AnswerCache) -> None:
        self._model, self._cache = model, cache
        self.identity = model.identity

    def close(self) -> None:
        """Close the model; the cache is others' too."""
        self._model.close()

    def generate(self, questions: Sequence[Question], max_tokens: int) -> list[Answer[str]]:
        """See JudgeModel."""

        def ask(new: Sequence[Question]) -> list[Answer[str]]:
            return self._model.generate(new, max_tokens)

        return self._answers(["generate", max_tokens], questions, ask, str.encode, bytes.decode)

    def label_logprobs(self, questions: Sequence[Question], labels: Sequence[str]) -> list[Answer[np.ndarray]]:
        """See JudgeModel."""

        def ask(new: Sequence[Question]) -> list[Answer[np.ndarray]]:
            return self._model.label_logprobs(new, labels)

        return self._answers(["labels", *labels], questions, ask, _packed, _unpacked)

    def head(self, questions: Sequence[Question]) -> list[Answer[np.ndarray]]:
        """See JudgeModel."""
        return self._answers(["head"], questions, self._model.head, _packed, _unpacked)

    def _answers(
        self,
        kind: list[Any],
        questions: Sequence[Question],
        ask: Callable[[Sequence[Question]], list[Answer[Any]]],
        pack: Callable[[Any], bytes],
        unpack: Callable[[bytes], Any],
    ) -> list[Answer[Any]]:
        keys = [self._key(kind, question) for question in questions]
        held = self._cache.get(list(dict.fromkeys(keys)))
        cached = Asked(self.identity, 0.0, 0.0, cached=True)
        known = {key: Answer(unpack(answer), cached) for key, answer in held.items()}
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        asked = dict(zip(new, ask(list(new.values())), strict=True)) if new else {}
        lasting = {key: answer.value for key, answer in asked.items() if _is_lasting(new[key])}
        self._cache.put({key: pack(value) for key, value in lasting.items() if _is_answer(value)})
        answers = []
        for key in keys:
            answers.append(known[key] if key in known else asked[key])
            # Of equal questions in one batch the first was asked, and the others have its answer for nothing.
            known[key] = Answer(answers[-1].value, cached)
        return answers

    def _key(self, kind: list[Any], question: Question) -> bytes:
        parts = [part if isinstance(part, str) else [image_url(part.source)] for part in question.user]
        whole = json.dumps([_REQUESTS, self.identity, kind, question.system, parts])
        return hashlib.sha256(whole.encode()).digest()


def _is_lasting(question: Question) -> bool:
    """Whether what is asked about cannot change: texts, and images of which the key holds the bytes."""
    return not any(
        isinstance(part, Image) and part.source.startswith(("http://", "https://")) for part in question.user
    )


def _is_answer(value: Any) -> bool:
    """Neither missing nor numbers of which one is none, which another try may mend."""
    return not isinstance(value, Missing) and (isinstance(value, str) or bool(np.isfinite(value).all()))


def _packed(values: np.ndarray) -> bytes:
    return values.astype("<f4").tobytes()


def _unpacked(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<f4")
