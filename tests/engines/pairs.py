"""200 pairs of a prompt and a response, the same for every route to a model, and what judges are asked about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from common.config.judging import JudgeSection
from common.rewards.judges.question import build_question, language
from common.serving.model import Answer, JudgeModel, Question
from common.types import Message, Prompt

ROOT = Path(__file__).parents[2]
DATA = ROOT / "configs" / "quickstart_judge"
COUNT = 200


def pairs() -> list[tuple[Prompt, str]]:
    """Held-out examples of the quickstart's judge, which nothing was fitted to."""
    records = [
        json.loads(line)
        for name in ("verdicts_heldout.jsonl", "values_heldout.jsonl")
        for line in (DATA / name).read_text(encoding="utf-8").splitlines()
    ]
    chosen = records[:: max(len(records) // COUNT, 1)][:COUNT]
    assert len(chosen) == COUNT
    return [
        (
            Prompt(record["id"], "", tuple(Message(**turn) for turn in record["prompt"]), record["verdict"]),
            record["response"],
        )
        for record in chosen
    ]


def judge(name: str) -> JudgeSection:
    """A judge that `configs/judge` ships."""
    table = YAML(typ="safe", pure=True).load(ROOT / "configs" / "judge" / f"{name}.yaml")
    return JudgeSection.model_validate(table["rewards"]["judges"][name])


def questions(section: JudgeSection) -> list[Question]:
    """What the judge is asked about each pair; its reference is the pair's verdict."""
    asked = []
    for prompt, response in pairs():
        spoken = language(prompt)
        asked.append(build_question(section.prompt(spoken), prompt, response, spoken))
    return asked


def label_probabilities(model: JudgeModel, name: str) -> np.ndarray:
    """float64 [N L]: each verdict's share among the verdicts' first tokens, for a judge of that read-out."""
    section = judge(name)
    return _softmax(_values(model.label_logprobs(questions(section), list(section.read_out.verdicts))))


def head_outputs(model: JudgeModel, section: JudgeSection) -> np.ndarray:
    """float64 [N C]: the outputs of the head for each pair."""
    return _values(model.head(questions(section)))


def head_probabilities(model: JudgeModel) -> dict[str, np.ndarray]:
    """float64 [N L] by judge of the quickstart: each verdict's share among the outputs of its head."""
    judges = YAML(typ="safe", pure=True).load(DATA / "judge.yaml")["rewards"]["judges"]
    sections = {name: JudgeSection.model_validate(table) for name, table in judges.items()}
    return {
        name: _softmax(head_outputs(model, section)[:, section.read_out.outputs]) for name, section in sections.items()
    }


def _values(answers: Sequence[Answer[np.ndarray]]) -> np.ndarray:
    for answer in answers:
        assert isinstance(answer.value, np.ndarray), answer
    return np.stack([np.asarray(answer.value, np.float64) for answer in answers])


def _softmax(values: np.ndarray) -> np.ndarray:
    exponents = np.exp(values - values.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)
