"""Loading takes the memory of what a process keeps, not that of the model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.teams import finished, started
from tests.tiny import make_model

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
BYTES = 800e6  # of its weights
SPARE = 200e6


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_a_process_reads_its_own_shards(engine: str, count: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "tiny")
        model = make_model(folder / "model", **LARGE)
        with started(count, f"tests.{engine}.loading", model, folder / "out.json") as processes:
            for done in finished(processes):
                assert done.returncode == 0, done.stderr
        found = json.loads((folder / "out.json").read_text())
    assert found["shards"] * count >= BYTES
    assert found["peak"] <= found["shards"] + found["largest"] + SPARE, found
