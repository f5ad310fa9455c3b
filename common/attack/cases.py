"""Cases: bad answers that deserve a low score, and which judges of a recipe each of them suits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from common.attack.families import Base
from common.config.judging import JudgeSection, Language, Marks, PromptSection, ReadOutSection
from common.config.run import RewardsSection
from common.config.section import ConfigError, Section
from common.config.sentences import Origin, sentence
from common.data.chat import transcript
from common.data.records import BadRecord, parse_line
from common.rewards.judges.question import language
from common.types import Message, Prompt, Sample

_PRAISE: dict[Language, str] = {"en": "perfect answer", "zh": "完美的回答"}  # where a judge has no words of its own
_KEY = "rewards.attack_cases"


class Case(Section):
    """One line of a file of cases: a question, and a bad answer to it.

    labels: of the recipe; judges whose samples have one of them may get the case. response: as a policy would write it,
    with or without a think block. reference: for judges that compare with one, and for no other.
    """

    id: str
    labels: list[str] = Field(min_length=1)
    prompt: str
    response: str = Field(min_length=1)
    reference: Any = None

    def sample(self, response: str) -> Sample:
        """A response to the case's question as a verifier sees it, split as a sampled one would be."""
        prompt = Prompt(self.id, self.labels[0], (Message("user", self.prompt),), self.reference)
        return Sample(prompt, transcript(response, opened=False))


def read_cases(path: str, origin: Origin) -> tuple[list[Case], str]:
    """Every case of a JSONL file, and the file's SHA-256. `origin` says where a config key was set.

    Raises ConfigError when the file cannot be read or a line is no case, naming it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror}). Correct the path, or start in the folder that it is relative to."
        raise ConfigError(sentence(_KEY, path, origin(_KEY), problem)) from None
    cases = [_case(line, f"{path}:{n}") for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    ids = [case.id for case in cases]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: several cases have the id {twice!r}. Give each its own.")
    return cases, hashlib.sha256(content).hexdigest()


def _case(line: bytes, place: str) -> Case:
    try:
        return Case.model_validate(parse_line(line))
    except BadRecord as error:
        raise ConfigError(f"{place}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field, problem = ".".join(map(str, first["loc"])), first["msg"]
        raise ConfigError(
            f"{place}: {field}: {problem}. A case has the texts id, prompt and response, a list of labels, and a "
            "reference for judges that compare with one."
        ) from None


def labels_by_judge(section: RewardsSection) -> dict[str, list[str]]:
    """The judges that the recipe uses, and the labels whose samples each gets, in the recipe's order."""
    found: dict[str, list[str]] = {}
    for label in section.recipe:
        for judge in dict.fromkeys(section.verifiers[name].judge for name in section.verifiers_of(label)):
            if judge is not None:
                found.setdefault(judge, []).append(label)
    return found


def suitable(cases: Sequence[Case], judge: JudgeSection, labels: Sequence[str]) -> list[Case]:
    """The cases with one of a judge's labels: those with a reference where it compares with one, else those without,
    because an answer that is only wrong is not bad to a judge that is not told what is right.
    """
    return [case for case in cases if set(case.labels) & set(labels) and (case.reference is not None) == judge.compares]


def base(case: Case, judge: JudgeSection) -> Base:
    """The case as the families begin with it, for one judge."""
    prompt, response = case.sample(case.response)
    spoken = language(prompt)
    return Base(
        reasoning=response.reasoning_text,
        answer=response.answer_text.strip(),
        verdict=best_verdict(judge.read_out, spoken),
        spoken=spoken,
        marks=_marks(judge.prompt(spoken), "response"),
        query_marks=_marks(judge.prompt(spoken), "query"),
        reference_marks=_marks(judge.prompt(spoken), "reference"),
        reference=None if case.reference is None else str(case.reference),
    )


def _marks(prompt: PromptSection, field: str) -> Marks:
    """Those around a field where it first stands; without any where it does not."""
    return next(iter(prompt.marks(field)), Marks("", ""))


def best_verdict(section: ReadOutSection, spoken: Language) -> str:
    """The first of a judge's verdicts with the highest score, its highest grade, or praise where it has neither."""
    if section.verdicts:
        return max(section.verdicts, key=section.verdicts.__getitem__)
    return f"{max(section.grades):g}" if section.grades else _PRAISE[spoken]
