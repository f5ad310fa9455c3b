"""Files of responses in two languages, and run files whose labels are judged by tiny models in process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.engine_main import Engine, run_verb
from tests.numpy_trainer import open_judge, open_trainer
from tests.runs import LOWERCASE, lowercase_run, prompt
from tests.teams import open_team
from tests.tiny import make_classifier, make_model

VERDICTS = {"Safe": 1.0, "Unsafe": 0.0, "Refusal": 0.1}
SAFETY = {"en": {"user": "Q: {query}\nA: {response}"}, "zh": {"user": "问：{query}\n答：{response}"}}
GOOD = {"en": {"user": "Good or bad? {response}"}}


def judged_run(folder: Path, rows: int = 16, **sections: dict[str, Any]) -> Path:
    """A run file with the labels `safety` (a classifier's verdicts), `value` (labels of a language model), `length`
    (a rule that counts tokens) and `both`. Its prompts are of `safety`. `rows` is that of the judges' models.
    """
    classifier = make_classifier(folder / "classifier", num_hidden_layers=1, classes=3)
    writer = make_model(folder / "writer", num_hidden_layers=1, seed=5)
    tables: dict[str, dict[str, Any]] = {
        "servers": {
            "classifier": {"engine": "in_process", "model": str(classifier), "rows": rows},
            "writer": {"engine": "in_process", "model": str(writer), "rows": rows},
        },
        "rewards": {
            "judges": {
                "safety": {
                    "server": "classifier",
                    "read_out": {"type": "classes", "verdicts": VERDICTS},
                    "prompts": SAFETY,
                },
                "good": {
                    "server": "writer",
                    "read_out": {"type": "labels", "verdicts": {"good": 1.0, "bad": 0.0}},
                    "prompts": GOOD,
                },
            },
            "verifiers": {
                "safety": {"judge": "safety"},
                "good": {"judge": "good"},
                "length": {"rule": "overlong", "options": {"max_length": 6, "buffer": 4}},
            },
            "recipe": {
                "safety": {"safety": 1.0},
                "value": {"good": 1.0},
                "length": {"length": 1.0},
                "both": {"safety": 1.0, "good": 0.5},
            },
        },
    }
    for name, changes in sections.items():
        tables[name] = {**tables.get(name, {}), **changes}
    records = [prompt(number, LOWERCASE, label="safety") for number in range(8)]
    return lowercase_run(folder, records, **tables)


def answered(number: int, label: str, **fields: Any) -> dict[str, Any]:
    """A record with a response, every third one in Chinese."""
    asked, said = (
        (f"第{number}个数是什么？", f"是{number}。") if number % 3 == 0 else (f"What is {number}?", f"{number}.")
    )
    return {"id": f"r{number}", "label": label, "prompt": asked, "response": said, **fields}


def write_answers(file: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Records as JSONL, not escaped."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def unasked(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of scores without how long the asking took."""
    return [{key: value for key, value in line.items() if key != "asked"} for line in lines]


def score_here(run_file: Path, file: Path, out: Path, *words: str, label: str = "") -> int:
    """`score` in this process, with no engine behind it: for labels that need no model."""
    return run_verb(
        Engine(open_team, open_trainer, open_judge), ["score", str(file), str(out), label, str(run_file), *words]
    )
