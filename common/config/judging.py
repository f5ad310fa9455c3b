"""The sections of judges, as data: what a judge is asked, how its answer becomes a score, and where its model runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from common.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

FIELDS = ("query", "response", "reference")
Language = Literal["en", "zh"]
FIELD = re.compile(r"\{([A-Za-z_]+)\}")
_SPACED = re.compile(rf"\{{\s+({'|'.join(FIELDS)})\s*\}}|\{{({'|'.join(FIELDS)})\s+\}}", re.IGNORECASE)


class Marks(NamedTuple):
    """The texts of a judge's prompt right before and behind one of its fields; empty where there is none."""

    opening: str
    closing: str


class PromptSection(Section):
    """What a judge is asked in one language. `{query}`, `{response}` and `{reference}` of `user` stand for parts of the
    sample.

    system: the same for every sample; null leaves the chat template's own default.
    """

    user: str
    system: str | None = None

    @field_validator("user")
    @classmethod
    def _known_fields(cls, text: str) -> str:
        unknown = sorted(set(FIELD.findall(text)) - set(FIELDS))
        if unknown:
            raise ValueError(
                f"{{{unknown[0]}}} stands for nothing. Use {', '.join(f'{{{name}}}' for name in FIELDS)}, or another "
                "bracket"
            )
        if "response" not in FIELD.findall(text):
            raise ValueError("the judge would not see the response. Put {response} where it belongs")
        if spaced := _SPACED.search(text):
            raise ValueError(f"{spaced[0]} stands for nothing. Leave out the blanks")
        return text

    @field_validator("system")
    @classmethod
    def _no_fields(cls, text: str | None) -> str | None:
        for name in FIELD.findall(text or ""):
            if name in FIELDS:
                raise ValueError(f"{{{name}}} is filled in user alone. Put it there")
        return text

    def shows(self, field: str) -> bool:
        """Whether the judge is shown a field of the sample."""
        return field in FIELD.findall(self.user)

    def marks(self, field: str) -> Marks:
        """The texts right before and behind a field: a line, or what stands on the field's own, up to another field."""
        before, _, behind = self.user.partition(f"{{{field}}}") if self.shows(field) else ("", "", "")
        opening, closing = before.rstrip().rpartition("\n")[2], behind.strip().partition("\n")[0]
        return Marks(FIELD.split(opening)[-1].strip(), FIELD.split(closing)[0].strip())


_READ_BY = {
    "verdicts": ("verdict", "labels", "classes"),
    "grades": ("number",),
    "hard": ("labels", "classes"),
    "outputs": ("classes", "scalar"),
}


class ReadOutSection(Section):
    """How a judge's answer becomes a score.

    verdict: the verdict that stands first in up to `max_tokens` greedy tokens. number: the first number in them, moved
    to the nearest of `grades`. labels: the probability of each verdict's first token among those of all verdicts.
    classes: the softmax of a head with one output a verdict, in order. scalar: the one output of a head, as it is.
    labels and classes score the expected value, or with `hard` that of the most probable verdict. outputs: which of the
    head's outputs these are, counted from 0; null: all of them.
    """

    type: Literal["verdict", "number", "labels", "classes", "scalar"]
    verdicts: dict[str, float] = Field(default_factory=dict)
    grades: list[float] = Field(default_factory=list)
    max_tokens: PositiveInt = 16
    hard: bool = False
    outputs: list[NonNegativeInt] | None = None

    @model_validator(mode="after")
    def _complete(self) -> ReadOutSection:
        if self.outputs is not None and len(self.outputs) != (len(self.verdicts) if self.type == "classes" else 1):
            raise ValueError("outputs names one output of the head for each verdict, or the only one of a scalar")
        if self.type in ("verdict", "labels", "classes") and len(self.verdicts) < 2:
            raise ValueError(f"a read-out of type {self.type} chooses among verdicts. Name at least two of them")
        if self.type == "number" and len(self.grades) < 2:
            raise ValueError("a read-out of type number chooses among grades. Name at least two of them")
        for name, types in _READ_BY.items():
            if vars(self)[name] and self.type not in types:
                raise ValueError(f"a read-out of type {self.type} does not read {name}. Leave it out")
        return self

    @property
    def lowest(self) -> float | None:
        """The lowest score that there can be; None for a scalar, which has no bounds."""
        return min((*self.verdicts.values(), *self.grades), default=None)


class JudgeSection(Section):
    """A judge: a prompt in each language, a read-out, and the name of the server that runs its model.

    prompts: by language, `en` and `zh`; the language of the question chooses, `en` where its own is missing.
    images: whether the judge is shown the images of the question; one that is shown the question without them refuses
    prompts with images.
    think_aware: `on` scores the reasoning times the answer, where no score can be negative. Off, because a policy that
    is paid for innocent reasoning learns to hide what it thinks; `measure` asks about the reasoning too, and records
    how far the two lie apart alone.
    """

    server: str
    prompts: dict[Language, PromptSection]
    read_out: ReadOutSection
    images: bool = False
    think_aware: Literal["off", "measure", "on"] = "off"

    def prompt(self, spoken: Language) -> PromptSection:
        """What is asked in a language; the English where it has none of its own."""
        return self.prompts.get(spoken) or self.prompts["en"]

    @property
    def compares(self) -> bool:
        """Whether the judge is shown a reference."""
        return any(prompt.shows("reference") for prompt in self.prompts.values())

    @field_validator("think_aware", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("prompts")
    @classmethod
    def _has_english(cls, prompts: dict[str, PromptSection]) -> dict[str, PromptSection]:
        if "en" not in prompts:
            raise ValueError("en is missing, which every language without a prompt of its own falls back to. Add it")
        return prompts

    @model_validator(mode="after")
    def _fits(self) -> JudgeSection:
        if self.images and not all(prompt.shows("query") for prompt in self.prompts.values()):
            raise ValueError("images are shown with the question, which a prompt has no {query} for. Set images: false")
        if self.think_aware == "on" and not self.may_multiply:
            raise ValueError(
                "think_aware: on multiplies scores, and two negative ones would become a good one. Give the read-out "
                "scores from 0 up, or set think_aware to measure"
            )
        return self

    @property
    def may_multiply(self) -> bool:
        """Whether no score of the judge is negative, so that products of them keep their order."""
        return self.read_out.lowest is not None and self.read_out.lowest >= 0


_SHAPING = re.compile(
    "dtype|q|quantization|kv-cache-dtype|torchao-config|load-format|model-impl|revision|code-revision|hf-overrides|"
    "json-model-override-args|pooler-config|override-pooler-config|convert|enable-fp32-lm-head|chat-template|"
    "mm-processor-kwargs|rope-scaling|rope-theta"
)
_SECRET = re.compile(r"(key|token|password|secret)$", re.IGNORECASE)


def shaping_options(words: Iterable[str]) -> list[str]:
    """Those words of an engine's command line that change what its model answers, as they are: numbers and weights, not
    memory, speed or logs.
    """
    kept, shapes = [], False
    for word in words:
        if word.startswith("-"):
            shapes = _SHAPING.fullmatch(_option(word)) is not None
        if shapes:
            kept.append(word)
    return kept


def _option(word: str) -> str:
    return word.partition("=")[0].lstrip("-").replace("_", "-")


class LaunchSection(Section):
    """How `safework serve` starts a server: one process for each of its urls on this machine, which give host and port.

    python: the Python of the environment that holds the engine, such as `.venv-vllm/bin/python`. memory_fraction: of
    each GPU's memory; null leaves the engine's own default. options: further words of the engine's command line, as
    they are; those that change what the model answers (`shaping_options`) are part of what it is called in records.
    environment: variables beside those of the shell, which the server inherits. Both are kept with a run's config, so
    secrets belong in the shell. ready_s: seconds until it must be healthy.
    """

    python: str
    tensor_parallel: PositiveInt = 1
    memory_fraction: Fraction | None = None
    options: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    ready_s: PositiveFloat = 1800.0

    @model_validator(mode="after")
    def _no_secrets(self) -> LaunchSection:
        named = [_option(word) for word in self.options if word.startswith("-")] + list(self.environment)
        secret = next((name for name in named if _SECRET.search(name)), None)
        if secret is not None:
            raise ValueError(
                f"{secret} would be kept with every run and its scores. Leave it out here, and set the engine's "
                "variable for it in the shell (VLLM_API_KEY, HF_TOKEN)"
            )
        return self


class ServerSection(Section):
    """A model that judges ask, whatever it runs on. All judges that name a server share it.

    engine: `vllm` and `sglang` serve it over HTTP, the same model at each of `urls`; with `in_process` it lives beside
    the policy, on the trainer's own engine and in its dtype. model: a local Hugging Face folder, a hub name, or an
    `embedded:` model; its tokenizer writes the questions. head: a safetensors file with a tensor `score.weight` [C D],
    which takes the place of the model's own head.
    Over HTTP: served_name is what the servers call it, if not `model`; revision is part of the model's name in records
    and in the cache of answers, to be changed when other weights come to stand behind one name or folder, or the same
    ones in other numbers; api_key_env: the environment variable that holds the key of servers that want one;
    concurrency: questions in flight at each url; deadline_s: seconds for one question, with all its retries; launch:
    null where somebody else starts the servers.
    In process: rows are questions computed side by side; rests_in: where the weights are while nobody asks.
    """

    engine: Literal["vllm", "sglang", "in_process"]
    model: str
    head: str | None = None
    urls: list[str] = Field(default_factory=list)
    served_name: str | None = None
    revision: str | None = None
    api_key_env: str | None = None
    concurrency: PositiveInt = 64
    deadline_s: PositiveFloat = 120.0
    retries: NonNegativeInt = 3
    launch: LaunchSection | None = None
    rows: PositiveInt = 16
    rests_in: Literal["device", "host"] = "device"

    @field_validator("urls")
    @classmethod
    def _no_secrets(cls, urls: list[str]) -> list[str]:
        if any("@" in url.partition("://")[2].partition("/")[0] for url in urls):
            raise ValueError(
                "an address with a user or password would be written with every score. Leave it out, and name the "
                "variable that holds the server's key in api_key_env"
            )
        return urls

    @model_validator(mode="after")
    def _has_place(self) -> ServerSection:
        if self.engine == "in_process" and self.urls:
            raise ValueError("a model in process has no urls. Leave them out, or set engine to vllm or sglang")
        if self.engine == "in_process" and self.launch is not None:
            raise ValueError("a model in process is opened by the trainer. Leave launch out")
        if self.engine != "in_process" and not self.urls:
            raise ValueError(f"an engine of {self.engine} is reached by HTTP. Give its urls, one for each replica")
        return self
