"""The models of a config that judges ask, each opened once, when the first judge needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from common.config.load import LoadedConfig
from common.config.sentences import blamed
from common.config.servers import ServerSection
from common.data.embedded_model import default_cache
from common.serving.answer_cache import AnswerCache
from common.serving.cached import CachedModel
from common.serving.in_process import InProcessModel, OpenJudge
from common.serving.model import JudgeModel, Question
from common.serving.served import ServedModel


class _Elsewhere:
    """The JudgeModel of a process that asks nothing, because another one of its host asks for it."""

    identity = "asked by another process of this host"

    def generate(self, questions: Sequence[Question], max_tokens: int) -> NoReturn:
        raise AssertionError(self.identity)

    def label_logprobs(self, questions: Sequence[Question], labels: Sequence[str]) -> NoReturn:
        raise AssertionError(self.identity)

    def head(self, questions: Sequence[Question]) -> NoReturn:
        raise AssertionError(self.identity)

    def close(self) -> None:
        """There is nothing to release."""


class Servers:
    """The judge models of a config by server name. `open_judge` opens a model in process. Where `asks` is off, nothing
    is opened and nothing can be asked.

    With `rewards.cache`, answers over HTTP are kept in one file per host. A model in process is asked every time: what
    it computes depends in the last bits on the questions beside, and a run repeats bit for bit whatever ran before it.
    """

    def __init__(self, loaded: LoadedConfig, open_judge: OpenJudge, asks: bool = True) -> None:
        self._loaded, self._open_judge, self._asks = loaded, open_judge, asks
        self._opened: dict[str, JudgeModel] = {}
        self._cache: AnswerCache | None = None

    def open(self, name: str) -> JudgeModel:
        """The model of a server; several judges share one. Raises ServerError and ConfigError."""
        if name not in self._opened:
            section = self._loaded.config.servers[name]
            self._opened[name] = self._open(name, section) if self._asks else _Elsewhere()
        return self._opened[name]

    def _open(self, name: str, section: ServerSection) -> JudgeModel:
        with blamed(f"servers.{name}.model", section.model, self._loaded.origin):
            if section.engine == "in_process":
                backend = self._loaded.config.backend
                return InProcessModel(section, self._open_judge, f"{backend.dtype} of {backend.name}")
            served = ServedModel(name, section)
        if not self._loaded.config.rewards.cache:
            return served
        self._cache = self._cache or AnswerCache(default_cache() / "answers.sqlite")
        return CachedModel(served, self._cache)

    def close(self) -> None:
        """Close every connection."""
        for model in self._opened.values():
            model.close()
        if self._cache is not None:
            self._cache.close()
