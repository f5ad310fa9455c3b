"""Several processes under each mode of sharding: the gradient and the update of one, weights really in shards, and as
many collectives as the mode is meant to need.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.teams import finished, started
from tests.tiny import make_model
from tests.torch.many_processes import BATCHES, OFFLOADED
from tests.trainer_contract import assert_close_gradients
from tests.training import saved_state, write_run

TWO = ("zero1", "zero2", "zero3", f"zero1{OFFLOADED}", f"zero3{OFFLOADED}")
MODES = (*TWO, "hybrid")
LAYERS = 2
GATHER, REDUCE, SUM = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"
# For an update of four micro-batches: a group for each layer, and one for the weights outside them.
CALLS = {
    "zero1": {GATHER: LAYERS + 1, REDUCE: LAYERS + 1, SUM: 0},
    "zero2": {GATHER: 4 * (LAYERS + 1), REDUCE: 4 * (LAYERS + 1), SUM: 0},
    "zero3": {
        GATHER: 4 * (2 * LAYERS + 1),
        REDUCE: 4 * (LAYERS + 1),
        SUM: 0,
    },
}
CALLS["hybrid"] = CALLS["zero3"] | {SUM: 4 * (LAYERS + 1)}
CALLS |= {f"{mode}{OFFLOADED}": CALLS[mode] for mode in ("zero1", "zero3")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.torch.many_processes` wrote: a folder for each mode, and `one` of a single process."""
    folder = tmp_path_factory.mktemp("processes")
    model = make_model(folder / "model", num_hidden_layers=LAYERS)
    run_file = write_run(folder, model)
    measure(folder / "alone", run_file, model, 1, 1, "zero3")
    (folder / "alone" / "zero3").rename(folder / "one")
    measure(folder, run_file, model, 2, 1, *TWO)
    measure(folder, run_file, model, 4, 2, "hybrid")
    return folder


def measure(out: Path, run_file: Path, model: Path, count: int, hosts: int, *modes: str) -> None:
    with started(count, "tests.torch.many_processes", run_file, model, out, *modes, hosts=hosts) as processes:
        for done in finished(processes):
            assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_one_process(measured: Path, mode: str, batch: str) -> None:
    found, expected = (load_file(measured / folder / f"{batch}.safetensors") for folder in (mode, "one"))
    assert_close_gradients(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_state_after_an_update_is_that_of_one_process(measured: Path, mode: str) -> None:
    found, expected = saved_state(measured / mode), saved_state(measured / "one")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        limit = 1e-5 * np.abs(array).max() + (1e-5 if name.startswith("model/") else 0.0)
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=limit, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_moments_lie_in_shards(measured: Path, mode: str) -> None:
    assert set(facts(measured, mode)["shares"].values()) == {0.5}
    assert set(facts(measured, "one")["shares"].values()) == {1.0}


@pytest.mark.parametrize("mode", MODES)
def test_an_update_gathers_and_reduces_as_often_as_its_mode_needs(measured: Path, mode: str) -> None:
    calls = facts(measured, mode)["calls"]
    assert {name: calls.get(name, 0) for name in CALLS[mode]} == CALLS[mode]


def facts(folder: Path, mode: str) -> dict[str, Any]:
    return json.loads((folder / mode / "facts.json").read_text())
