"""The quickstart's judge judges: its shipped heads and wording on examples that they were not fitted to."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial

import pytest

from common.config import load_config
from common.rewards.judges.judge import Judge
from common.serving.servers import Servers
from common.types import Message, Prompt, Sample, Score, Transcript
from safework_torch.main import open_judge
from tests.training import ROOT

FOLDER = ROOT / "configs" / "quickstart_judge"


@pytest.mark.parametrize(
    ("name", "file", "accuracy", "majority"),
    [("safety_small", "verdicts_heldout.jsonl", 0.75, 0.2), ("value_small", "values_heldout.jsonl", 0.75, 0.51)],
)
def test_held_out_accuracy(
    name: str, file: str, accuracy: float, majority: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load_config(["configs/quickstart.yaml"])
    records = [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]
    samples = [
        Sample(
            Prompt(record["id"], name, tuple(Message(**turn) for turn in record["prompt"])),
            Transcript(record["response"], None, record["response"], None),
        )
        for record in records
    ]
    with closing(Servers(loaded, partial(open_judge, loaded))) as servers:
        section = loaded.config.rewards.judges[name]
        scores = Judge(name, section, servers.open(section.server)).score(samples)
    given = [record["verdict"] for record in records]
    assert max(map(given.count, given)) / len(given) < majority
    right = [
        isinstance(score, Score) and score.verdict == verdict for score, verdict in zip(scores, given, strict=True)
    ]
    assert sum(right) / len(right) >= accuracy
