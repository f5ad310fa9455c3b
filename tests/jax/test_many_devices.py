"""One program over meshes of 8 forced CPU devices, in one process and in two of `jax.distributed`: the loss, the
gradient and the update of one device, weights really in shards, and collectives really in the compiled program.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.jax.many_devices import MESHES
from tests.runs import SOON_COMPILED
from tests.teams import finished, started
from tests.tiny import make_model
from tests.trainer_contract import assert_close_gradients
from tests.training import saved_state, write_run

# Two processes have four devices each, and must use all.
MESHES_OF = {"one process": tuple(MESHES), "two processes": tuple(mesh for mesh in MESHES if mesh != "one")}
CASES = [(where, mesh) for where, meshes in MESHES_OF.items() for mesh in meshes]
PROCESSES = {"one process": 1, "two processes": 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.jax.many_devices` wrote: a folder for each case; `hlo`: the programs that one process compiled."""
    folder = tmp_path_factory.mktemp("devices")
    model = make_model(folder / "model")
    run_file = write_run(folder, model, backend={"name": "jax", "threads": 0})
    dump = f"--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*accumulate.* --xla_dump_to={folder / 'hlo'}"
    for where, count in PROCESSES.items():
        flags = f"{SOON_COMPILED} --xla_force_host_platform_device_count={8 // count} {dump if count == 1 else ''}"
        words = (run_file, model, folder / where, *MESHES_OF[where])
        with started(count, "tests.jax.many_devices", *words, XLA_FLAGS=flags) as processes:
            for done in finished(processes):
                assert done.returncode == 0, done.stderr
    return folder


def facts(measured: Path, where: str, mesh: str) -> dict[str, Any]:
    return json.loads((measured / where / mesh / "facts.json").read_text())


@pytest.mark.parametrize(("where", "mesh"), CASES)
def test_four_micro_batches_on_any_mesh_give_the_gradient_of_one_on_one(where: str, mesh: str, measured: Path) -> None:
    whole = load_file(measured / "one process" / "one" / "whole.safetensors")
    assert_close_gradients(load_file(measured / where / mesh / "split.safetensors"), whole)
    one, found = facts(measured, "one process", "one"), facts(measured, where, mesh)
    assert found["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("where", "mesh"), CASES[1:])
def test_states_after_an_update_are_equal(where: str, mesh: str, measured: Path) -> None:
    found, expected = saved_state(measured / where / mesh), saved_state(measured / "one process" / "one")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        limit = 1e-5 * np.abs(array).max() + (1e-5 if name.startswith("model/") else 0.0)
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=limit, err_msg=name)


@pytest.mark.parametrize(("where", "mesh"), CASES)
def test_every_matrix_and_its_moment_lie_in_shards(where: str, mesh: str, measured: Path) -> None:
    _, fsdp, tensor = MESHES[mesh]
    whole = facts(measured, "one process", "one")["shards"]
    for name, (count, size) in facts(measured, where, mesh)["shards"].items():
        split = fsdp * tensor if name.endswith("weight") and "norm" not in name else 1
        assert (count, size) == (min(split, 8 // PROCESSES[where]), whole[name][1] // split), name


@pytest.mark.parametrize(("where", "mesh"), CASES)
def test_later_updates_compile_nothing(where: str, mesh: str, measured: Path) -> None:
    assert facts(measured, where, mesh)["compiled"] == []


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
