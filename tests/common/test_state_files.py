"""Training state comes back bit for bit, from files that any safetensors reader opens; a full disk is an OSError."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from common.state_files import STEPS, TrainingState, read_parameters, read_state, write_state
from tests.full_disk import limited_files, small_disk

FILES = ["first_moment.safetensors", "model.safetensors", "second_moment.safetensors"]
FIELDS = ("parameters", "first_moment", "second_moment")

# Every bit pattern: subnormals, infinities, and not-a-numbers with whatever they carry.
BITS = hnp.arrays(np.uint32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
TENSORS = st.dictionaries(st.sampled_from(["model.norm.weight", "a.b", "lm_head.weight"]), BITS, min_size=1)


def as_floats(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: bits.view(np.float32) for name, bits in tensors.items()}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, array.shape)
        assert found[name].tobytes() == np.asarray(array, order="C").tobytes()


@settings(max_examples=60, deadline=None)
@given(tensors=st.tuples(TENSORS, TENSORS, TENSORS), steps=st.integers(0, 2**53))
def test_state_comes_back_bit_for_bit(
    tensors: tuple[dict[str, np.ndarray], ...], steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "state"
    folder.mkdir(exist_ok=True)
    state = TrainingState(*map(as_floats, tensors), optimizer_steps=steps)
    write_state(state, folder)
    found = read_state(folder)
    assert found.optimizer_steps == steps
    for field in FIELDS:
        assert_same_bits(vars(found)[field], vars(state)[field])
    assert_same_bits(read_parameters(folder), dict(state.parameters))


def state_of(array: np.ndarray) -> TrainingState:
    return TrainingState({"w": array}, {"w": array * 2}, {"w": array * 3}, 7)


def test_three_files_that_others_can_read(tmp_path: Path) -> None:
    write_state(state_of(np.arange(6, dtype=np.float32).reshape(2, 3)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    for name in FILES:
        with safe_open(tmp_path / name, "np") as file:
            assert file.metadata() == {STEPS: "7"}
            assert list(file.keys()) == ["w"]


@pytest.mark.parametrize("view", [np.transpose, lambda array: array[::-1], lambda array: array[:, ::2]])
def test_views_are_written_as_they_look(view: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    array = view(np.arange(24, dtype=np.float32).reshape(4, 6))
    write_state(state_of(array), tmp_path)
    np.testing.assert_array_equal(read_parameters(tmp_path)["w"], array)


def test_writing_again_replaces(tmp_path: Path) -> None:
    write_state(state_of(np.ones(5, np.float32)), tmp_path)
    write_state(state_of(np.zeros(2, np.float32)), tmp_path)
    np.testing.assert_array_equal(read_state(tmp_path).parameters["w"], np.zeros(2, np.float32))


@pytest.mark.parametrize(("disk", "code"), [(small_disk, errno.ENOSPC), (limited_files, errno.EFBIG)])
def test_full_disk_is_an_os_error_that_names_the_file(
    disk: Callable[[Path], AbstractContextManager[Path]], code: int, tmp_path: Path
) -> None:
    with disk(tmp_path / "disk") as folder, pytest.raises(OSError, match=r"model\.safetensors'$") as caught:
        write_state(state_of(np.ones(2**20, np.float32)), folder)
    assert caught.value.errno == code
    with disk(tmp_path / "other") as folder:
        write_state(state_of(np.ones(2**14, np.float32)), folder)
        assert sorted(path.name for path in folder.iterdir()) == FILES


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors'$"):
        write_state(state_of(np.ones(2, np.float32)), tmp_path / "nowhere")
