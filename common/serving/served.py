"""A judge's model behind HTTP: questions rendered here, answered by a server's replicas."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from common.config.servers import ServerSection
from common.data.model_folder import engine_path, tokenizer_folder
from common.serving import sglang, vllm
from common.serving.dialect import Dialect
from common.serving.http import UNREADABLE, Call, CallFailed, Replicas
from common.serving.launch import served_name
from common.serving.model import Answer, Question
from common.serving.rendering import Renderer
from common.types import Asked, Missing

_CHECK_S = 5.0

DIALECTS: dict[str, Dialect] = {"vllm": vllm, "sglang": sglang}


class ServerError(RuntimeError):
    """A server cannot be used: it does not answer, or serves another model. The message names it and what to do."""


def authorization(name: str, section: ServerSection) -> dict[str, str]:
    """The header with a server's key. Raises ServerError when the variable that should hold it holds none."""
    if section.api_key_env is None:
        return {}
    key = os.environ.get(section.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        problem = "holds no key that a header can carry" if key else "is not set"
        raise ServerError(
            f"server {name}: the environment variable {section.api_key_env} (servers.{name}.api_key_env) {problem}. "
            "Put the server's key there."
        )
    return {"Authorization": f"Bearer {key}"}


def served_weights(name: str, section: ServerSection, expected: str, url: str, reply: Any) -> str:
    """What a server's reply to its dialect's MODELS says that it serves, for a person and for comparison.

    Raises ServerError when that is another model than the one `expected`, or it does not say.
    """
    try:
        served, weights = DIALECTS[section.engine].identity(reply)
    except UNREADABLE:
        raise ServerError(
            f"server {name} at {url} does not say what it serves, as {section.engine} would. Correct "
            f"servers.{name}.urls or servers.{name}.engine."
        ) from None
    if served != expected:
        raise ServerError(
            f"server {name} at {url} serves {served!r}, and servers.{name} names {expected!r}. "
            "Set served_name to what it is called there, or start the right model."
        )
    loaded = served if section.engine == "sglang" else weights  # vLLM calls a model whatever it was told to
    folder = None if section.head is None else _head_folder(section.model, section.head)
    if folder is not None and Path(loaded).name != folder:
        raise ServerError(
            f"server {name} at {url} loaded {loaded}, and servers.{name}.head asks for the folder {folder}. Start it "
            "by safework serve, or from a copy of that folder of this name."
        )
    return f"{served} from {weights}"


@lru_cache  # each batch of questions asks again
def _head_folder(model: str, head: str) -> str:
    """The name of the folder of a model with a head, which it has wherever it was copied to."""
    return Path(engine_path(model, head)).name


class ServedModel:
    """A JudgeModel at the `urls` of a server section.

    Opening it asks each replica what it serves; raises ServerError when none answers or one serves another model than
    the config names. Each batch of questions ends with asking again, so that a model which is exchanged during a run
    ends the run instead of changing its scores.
    """

    def __init__(self, name: str, section: ServerSection) -> None:
        self._name, self._section = name, section
        self._dialect = DIALECTS[section.engine]
        self._render = Renderer(tokenizer_folder(section.model))
        self._served = served_name(section)
        self._replicas = Replicas(name, section, authorization(name, section))
        with ExitStack() as unless_opened:
            unless_opened.callback(self._replicas.close)
            self._weights = self._open()
            unless_opened.pop_all()
        revision = "" if section.revision is None else f" at {section.revision}"
        # Such as --dtype: the same weights in other numbers.
        shaping = [] if section.launch is None else section.launch.shaping
        through = " ".join(["through", section.engine, *shaping])
        self.identity = f"{self._weights}{revision} {through}, template {self._render.chat.digest}"

    def close(self) -> None:
        """Close the connections."""
        self._replicas.close()

    def generate(self, questions: Sequence[Question], max_tokens: int) -> list[Answer[str]]:
        """See JudgeModel."""
        self._render.refuse_reasoning()
        return self._ask(self._dialect.generate(self._served, self._render(asked), max_tokens) for asked in questions)

    def label_logprobs(self, questions: Sequence[Question], labels: Sequence[str]) -> list[Answer[np.ndarray]]:
        """See JudgeModel."""
        self._render.refuse_reasoning()
        label_ids = self._render.chat.first_tokens(labels)
        return self._ask(
            self._dialect.label_logprobs(self._served, self._render(asked), label_ids, self._api) for asked in questions
        )

    def head(self, questions: Sequence[Question]) -> list[Answer[np.ndarray]]:
        """See JudgeModel."""
        return self._ask(self._dialect.head(self._served, self._render(asked), self._api) for asked in questions)

    def _ask(self, calls: Iterable[Call]) -> list[Answer[Any]]:
        replies = self._replicas.call_all(calls)
        if replies:
            self._refuse_exchange()
        return [
            Answer(
                Missing(str(reply.result)) if isinstance(reply.result, CallFailed) else reply.result,
                Asked(self.identity, reply.queue_s, reply.latency_s, cached=False),
            )
            for reply in replies
        ]

    def _open(self) -> str:
        """What all replicas that answer serve; a replica that does not is reported."""
        found = self._serving(self._section.deadline_s)
        down = [str(reply) for reply in found.values() if isinstance(reply, CallFailed)]
        if len(down) == len(found):
            raise ServerError(f"server {self._name}: {down[0]}. Start it, or correct servers.{self._name}.urls.")
        for reason in down:
            print(f"server {self._name}: {reason}; going on with its other replicas", file=sys.stderr)
        weights = {weights for weights in found.values() if not isinstance(weights, CallFailed)}
        if len(weights) > 1:
            raise ServerError(
                f"the replicas of server {self._name} serve different weights: {found}. Start them alike."
            )
        return weights.pop()

    @cached_property
    def _api(self) -> Any:
        """What the servers can be asked, as the first one that answers says: replicas are of one version."""
        found = list(self._replicas.ask_each(self._dialect.API, self._section.deadline_s).values())
        for api in found:
            if not isinstance(api, CallFailed):
                return api
        raise ServerError(
            f"server {self._name} does not describe its routes ({found[0]}), which labels and heads need. Start it, "
            "vLLM without --disable-fastapi-docs."
        )

    def _refuse_exchange(self) -> None:
        for url, weights in self._serving(min(_CHECK_S, self._section.deadline_s)).items():
            if not isinstance(weights, CallFailed) and weights != self._weights:
                raise ServerError(
                    f"server {self._name} at {url} serves {weights} now, and served {self._weights} when this began. "
                    "Its last scores were not used. Start the first model again and go on, or begin anew."
                )

    def _serving(self, limit_s: float) -> dict[str, str | CallFailed]:
        """What each replica says that it serves. Raises ServerError for a model of another name than the config's."""
        found: dict[str, str | CallFailed] = {}
        for url, reply in self._replicas.ask_each(self._dialect.MODELS, limit_s).items():
            if isinstance(reply, CallFailed):
                found[url] = reply
            else:
                found[url] = served_weights(self._name, self._section, self._served, url, reply)
        return found
