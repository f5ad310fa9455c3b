"""The judges that `configs/judge` ships, parsed as a run would."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from common.config.judging import JudgeSection, ReadOutSection

FOLDER = Path(__file__).parents[3] / "configs" / "judge"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def judge(name: str) -> JudgeSection:
    table = YAML(typ="safe", pure=True).load(FOLDER / f"{name}.yaml")
    return JudgeSection.model_validate(table["rewards"]["judges"][name])


def read_out(name: str) -> ReadOutSection:
    return judge(name).read_out
