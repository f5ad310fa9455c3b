"""Training state comes back bit for bit, from files that any safetensors reader opens, in any number of parts; a state
that is not whole is an error in a sentence, a full disk an OSError.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from common.disk import NotSaved
from common.state_files import MANIFEST, open_state, save_tensors, seal, whole, write_part, write_state
from common.types import Piece, TrainingState
from tests.full_disk import limited_files, small_disk

FILES = ["first_moment.safetensors", MANIFEST, "model.safetensors", "second_moment.safetensors"]
KINDS = ("model", "first_moment", "second_moment")

# Every bit pattern: subnormals, infinities, and not-a-numbers with whatever they carry.
BITS = hnp.arrays(np.uint32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
TENSORS = st.dictionaries(st.sampled_from(["model.norm.weight", "a.b", "lm_head.weight"]), BITS, min_size=1)


def state_of(tensors: Mapping[str, np.ndarray], steps: int = 7) -> TrainingState:
    """Moments are the parameters in another order of their bytes: told apart, and of the same shapes."""
    pieces = {name: whole(array) for name, array in tensors.items()}
    others = {name: whole(array.byteswap()) for name, array in tensors.items()}
    return TrainingState({"model": pieces, "first_moment": others, "second_moment": pieces}, steps)


def of_one(array: np.ndarray) -> TrainingState:
    return state_of({"w": array})


@settings(max_examples=60, deadline=None)
@given(bits=TENSORS, steps=st.integers(0, 2**53))
def test_state_comes_back_bit_for_bit(
    bits: dict[str, np.ndarray], steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "state"
    folder.mkdir(exist_ok=True)
    state = state_of({name: array.view(np.float32) for name, array in bits.items()}, steps)
    write_state(state, folder)
    with open_state(folder) as saved:
        assert (saved.optimizer_steps, saved.kinds) == (steps, list(KINDS))
        assert saved.shapes == {name: array.shape for name, array in bits.items()}
        for kind, tensors in state.tensors.items():
            for name, [piece] in tensors.items():
                found = saved.read(kind, name)
                assert (found.dtype, found.shape) == (np.float32, piece.array.shape)
                assert found.tobytes() == np.asarray(piece.array, order="C").tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_is_read_out_of_any_parts(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "parts"
    folder.mkdir(exist_ok=True)
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    count = data.draw(st.integers(1, 4))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=count - 1, max_size=count - 1)))
    bounds = list(zip([0, *cuts], [*cuts, rows], strict=True))
    column = data.draw(st.integers(0, columns))
    for index, (start, stop) in enumerate(bounds):
        halves = [(0, column), (column, columns)]  # a process may have several pieces of a tensor, or none
        pieces = [Piece(array[start:stop, a:b], (start, a), array.shape) for a, b in halves if stop > start and b > a]
        write_part(TrainingState({"model": {"w": pieces}}, 1), folder, index, count)
    seal(folder, count, {"cursor": 3})
    start, stop = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2)))
    with open_state(folder) as saved:
        np.testing.assert_array_equal(saved.read("model", "w"), array)
        np.testing.assert_array_equal(saved.read("model", "w", (slice(start, stop),)), array[start:stop])


def test_files_that_others_can_read(tmp_path: Path) -> None:
    write_state(of_one(np.arange(6, dtype=np.float32).reshape(2, 3)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    for name in FILES:
        if name != MANIFEST:
            with safe_open(tmp_path / name, "np") as file:
                assert list(file.keys()) == ["w"]
    assert json.loads((tmp_path / MANIFEST).read_text())["shapes"] == {"w": [2, 3]}


@pytest.mark.parametrize("view", [np.transpose, lambda array: array[::-1], lambda array: array[:, ::2]])
def test_views_are_written_as_they_look(view: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    array = view(np.arange(24, dtype=np.float32).reshape(4, 6))
    write_state(of_one(array), tmp_path)
    with open_state(tmp_path) as saved:
        np.testing.assert_array_equal(saved.read("model", "w"), array)


def test_writing_again_replaces(tmp_path: Path) -> None:
    write_state(of_one(np.ones(5, np.float32)), tmp_path)
    write_state(of_one(np.zeros(2, np.float32)), tmp_path)
    with open_state(tmp_path) as saved:
        np.testing.assert_array_equal(saved.read("model", "w"), np.zeros(2, np.float32))


@pytest.mark.parametrize("bounds", [[(0, 2), (3, 4)], [(0, 3), (2, 4)], [(0, 2), (2, 5)], [(1, 4)], [(0, 4), (0, 4)]])
def test_slices_that_are_not_the_tensor_once_are_never_sealed(tmp_path: Path, bounds: list[tuple[int, int]]) -> None:
    for index, (start, stop) in enumerate(bounds):
        pieces = [Piece(np.ones((stop - start, 2), np.float32), (start, 0), (4, 2))]
        write_part(TrainingState({"model": {"w": pieces}}, 1), tmp_path, index, len(bounds))
    with pytest.raises(ValueError, match="the slices of 'w' are not each of its elements once"):
        seal(tmp_path, len(bounds), {})
    assert not (tmp_path / MANIFEST).exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def spoil(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize(
    ("change", "said"),
    [(cut, "has 111 bytes where 112 were written"), (spoil, "is damaged ("), (Path.unlink, "is not there")],
)
def test_a_changed_file_is_an_error_that_says_what_to_do(
    tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    write_state(of_one(np.ones(4, np.float32)), tmp_path)
    file = tmp_path / "first_moment.safetensors"
    change(file)
    with open_state(tmp_path) as saved, pytest.raises(NotSaved) as caught:
        saved.read("first_moment", "w")
    assert str(caught.value).startswith(f"{file}: {said}")
    said = f"remove {tmp_path}: the run then goes on from the checkpoint before it, or begins anew where there is none."
    assert str(caught.value).endswith(said)


@pytest.mark.parametrize(
    ("change", "said"), [(cut, "is damaged"), (Path.unlink, "is not there, so this is no checkpoint")]
)
def test_a_changed_manifest_is_an_error(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    write_state(of_one(np.ones(4, np.float32)), tmp_path)
    change(tmp_path / MANIFEST)
    with pytest.raises(NotSaved, match=f"{MANIFEST}: {said}"), open_state(tmp_path):
        raise AssertionError("it was opened")


LIKE = '{"loop": {}, "optimizer_steps": 1, "save": "", "shapes": {}, "parts": []}'


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("null", "Input should be an object"),
        ("[]", "Input should be an object"),
        ("{}", "'loop': Field required"),
        (LIKE, "'parts': "),
        (LIKE.replace("[]", "[{}]"), "'parts.0.bytes': "),
        (LIKE.replace('"shapes": {}', '"shapes": {"w": ["x"]}'), "'shapes.w.0': "),
        (LIKE.replace('"loop": {}', '"loop": 1'), "'loop': "),
    ],
)
def test_a_manifest_of_another_shape_is_an_error(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(NotSaved, match=rf"{MANIFEST}: is damaged \({what}"), open_state(tmp_path):
        raise AssertionError("it was opened")


def test_files_of_two_saves_are_no_state(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_part(of_one(np.ones(4, np.float32)), tmp_path / name, 0, 1, name)
        seal(tmp_path / name, 1, {})
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "two")
    with open_state(tmp_path / "two") as saved, pytest.raises(NotSaved, match="is of another save than its manifest"):
        saved.read("model", "w")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["parts"][0].update(slices={}), "the slices of 'w' are not each of its elements once"),
        (lambda found: found["parts"][0]["slices"].update(w=[[[0, 4], [0, 1]]]), "the slices of 'w'"),
        (lambda found: found["parts"][0]["slices"].update(w=[[[0, 3]]]), "the slices of 'w'"),
        (lambda found: found["parts"][0]["slices"].update(w=[[[0, 4]], [[4, 2]], [[2, 4]]]), "the slices of 'w'"),
        (lambda found: found.update(shapes={}), "its parts have tensors whose shapes it lacks"),
        (lambda found: found["shapes"].update(w=[-4]), "'shapes.w.0': Input should be greater than or equal to 0"),
        (lambda found: found["parts"][0]["bytes"].pop("model"), "its parts do not have the same kinds of tensors"),
        (lambda found: found.update(optimizer_steps="4"), "'optimizer_steps': Input should be a valid integer"),
        (lambda found: found["shapes"].update({"a\nb": ["x"]}), r"'shapes.a\nb.0': "),
    ],
)
def test_a_manifest_that_does_not_add_up_is_an_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    write_state(of_one(np.ones(4, np.float32)), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    change(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(NotSaved) as caught, open_state(tmp_path):
        raise AssertionError("it was opened")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_those_of_the_manifest_are_an_error(tmp_path: Path) -> None:
    write_state(of_one(np.ones(4, np.float32)), tmp_path)
    save_tensors({"v": np.ones(4, np.float32)}, tmp_path / "model.safetensors", {"save": ""})  # as long as the other
    with open_state(tmp_path) as saved, pytest.raises(NotSaved, match="its files are not those of its manifest"):
        saved.read("model", "w")


def test_another_models_tensors_are_refused(tmp_path: Path) -> None:
    write_state(of_one(np.ones(4, np.float32)), tmp_path)
    with open_state(tmp_path) as saved:
        saved.refuse_other_shapes({"w": (4,)})
        for shapes, said in (
            ({"w": (3,)}, r"w is \(4,\) there and \(3,\) here"),
            ({"w": (4,), "x": (1,)}, "x is None there"),
        ):
            with pytest.raises(NotSaved, match=said):
                saved.refuse_other_shapes(shapes)


@pytest.mark.parametrize(("disk", "code"), [(small_disk, errno.ENOSPC), (limited_files, errno.EFBIG)])
def test_full_disk_is_an_os_error_that_names_the_file(
    disk: Callable[[Path], AbstractContextManager[Path]], code: int, tmp_path: Path
) -> None:
    with disk(tmp_path / "disk") as folder, pytest.raises(OSError, match=r"model\.safetensors'$") as caught:
        write_state(of_one(np.ones(2**20, np.float32)), folder)
    assert caught.value.errno == code
    with disk(tmp_path / "other") as folder:
        write_state(of_one(np.ones(2**14, np.float32)), folder)
        assert sorted(path.name for path in folder.iterdir()) == FILES


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors'$"):
        write_state(of_one(np.ones(2, np.float32)), tmp_path / "nowhere")
