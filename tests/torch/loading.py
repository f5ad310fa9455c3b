"""What it takes one of several processes to load its shards: `python -m tests.torch.loading MODEL OUT`, for each.

Process 0 writes into OUT the bytes of its shards, of the largest tensor, and of the peak during loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from safework_torch.model import empty_model
from safework_torch.processes import open_team
from safework_torch.sharding import Whole, local
from tests.memory import peak_growth

CPU = torch.device("cpu")


def main(model: str, out: str) -> None:
    """Load a tiny model, which brings in all code, and then the one to measure."""
    with open_team(60.0) as team:
        load(Path(out).parent / "tiny")
        loaded: list[Whole] = []
        peak = peak_growth(lambda: loaded.append(load(Path(model))))
        weights = loaded[0].masters.values()
        if team.leads:
            shards, largest = sum(local(each).nbytes for each in weights), max(each.nbytes for each in weights)
            Path(out).write_text(json.dumps({"shards": shards, "largest": largest, "peak": peak}))


def load(folder: Path) -> Whole:
    whole = Whole(empty_model(folder, torch.float32), "zero3", torch.float32)
    whole.read(folder, CPU)
    return whole


if __name__ == "__main__":
    main(*sys.argv[1:])
