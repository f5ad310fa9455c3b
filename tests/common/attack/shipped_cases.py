"""The bad answers that `configs/attack` ships, read as the command reads them."""

from __future__ import annotations

from common.attack.cases import read_cases
from tests.training import ROOT

PATH = str(ROOT / "configs" / "attack" / "cases.jsonl")
CASES = read_cases(PATH, lambda key: "default")[0]
