"""The sections of judges, as data: what a judge is asked, and how its answer becomes a score."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from common.config.section import NonNegativeInt, PositiveInt, Section

FIELDS = ("query", "response", "reference")
Language = Literal["en", "zh"]
FIELD = re.compile(r"\{([A-Za-z_]+)\}")
_SPACED = re.compile(rf"\{{\s+({'|'.join(FIELDS)})\s*\}}|\{{({'|'.join(FIELDS)})\s+\}}", re.IGNORECASE)


class Marks(NamedTuple):
    """The texts of a judge's prompt right before and behind one of its fields; empty where there is none."""

    opening: str
    closing: str


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


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

    def marks(self, field: str) -> list[Marks]:
        """The texts right before and behind a field, wherever it stands: a line, or what is on the field's own, up to
        another field.
        """
        pieces = FIELD.split(self.user)
        return [
            Marks(_lines(pieces[place - 1])[-1], _lines(pieces[place + 1])[0])
            for place in range(1, len(pieces), 2)
            if pieces[place] == field
        ]


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
        if len({verdict.casefold() for verdict in self.verdicts}) < len(self.verdicts):
            raise ValueError("two verdicts differ by case alone, which is not read. Choose other words")
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
