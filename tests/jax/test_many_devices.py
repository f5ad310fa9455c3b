"""One program over meshes of 8 forced CPU devices: the loss, the gradient and the update of one, weights really in
shards, and collectives really in the compiled program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.jax.many_devices import MESHES
from tests.tiny import make_model
from tests.trainer_contract import assert_close_gradients
from tests.training import ROOT, saved_state, write_run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tests.jax.many_devices` wrote into; `hlo` holds its compiled programs."""
    folder = tmp_path_factory.mktemp("devices")
    model = make_model(folder / "model")
    run_file = write_run(folder, model, backend={"name": "jax", "threads": 0})
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*accumulate.* "
        f"--xla_dump_to={folder / 'hlo'}"
    )
    subprocess.run(
        [sys.executable, "-m", "tests.jax.many_devices", run_file, model, folder],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def facts(measured: Path) -> dict[str, Any]:
    return json.loads((measured / "facts.json").read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_four_micro_batches_on_any_mesh_give_the_gradient_of_one_on_one(
    mesh: str, measured: Path, facts: dict[str, Any]
) -> None:
    split, whole = load_file(measured / mesh / "split.safetensors"), load_file(measured / "whole.safetensors")
    assert_close_gradients(split, whole)
    assert facts[mesh]["loss"] == pytest.approx(facts["one"]["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "one"])
def test_states_after_an_update_are_equal(mesh: str, measured: Path) -> None:
    found, expected = saved_state(measured / mesh), saved_state(measured / "one")
    for name, array in expected.items():
        limit = 1e-5 * np.abs(array).max() + (1e-5 if name.startswith("model.") else 0.0)
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=limit, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_matrix_and_its_moment_lie_in_shards(mesh: str, facts: dict[str, Any]) -> None:
    _, fsdp, tensor = MESHES[mesh]
    whole = facts["one"]["shards"]
    for name, (count, size) in facts[mesh]["shards"].items():
        split = fsdp * tensor if name.endswith("weight") and "norm" not in name else 1
        assert (count, size) == (split, whole[name][1] // split), name


def test_collectives_are_in_the_program_of_8_devices(measured: Path) -> None:
    programs = [path.read_text() for path in (measured / "hlo").glob("*accumulate*after_optimizations.txt")]
    over_8 = [text for text in programs if "num_partitions=8" in text]
    assert over_8 and len(over_8) < len(programs)
    for text in over_8:
        assert re.search(r"all-gather", text)
        assert re.search(r"reduce-scatter|all-reduce", text)
    for text in programs:
        if "num_partitions" not in text:
            assert "all-gather" not in text
