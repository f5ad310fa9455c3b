"""An export is a Hugging Face folder of its own: trained weights, all else from the model that training began with."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from common.data.chat import Chat
from common.disk import NotSaved
from common.export import MARKER, export_model, exported
from common.state_files import whole, write_state
from common.types import Kind, Message, TrainingState
from tests.full_disk import limited_files, small_disk
from tests.tiny import make_model

SIZES: dict[Kind, np.float32] = {"model": np.float32(1.0), "ema": np.float32(2.0)}


def checkpoint(folder: Path, **tensors: np.ndarray) -> Path:
    """Trained parameters, as a trainer saves them."""
    folder.mkdir(exist_ok=True)
    write_state(TrainingState({"model": {name: whole(array) for name, array in tensors.items()}}, 3), folder)
    return folder


def trained(folder: Path, source: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of the source model with every weight changed."""
    weights = {name: array + np.float32(0.1) for name, array in load_file(source / "model.safetensors").items()}
    return checkpoint(folder, **weights), weights


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("source") / "model")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("of the model trained from")
    return folder


def test_exported_weights_are_the_trained_ones(source: Path, tmp_path: Path) -> None:
    saved, weights = trained(tmp_path / "saved", source)
    export_model(saved, source, tmp_path / "out", "float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        assert found[name].tobytes() == array.tobytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file that does not say so


def test_a_large_model_is_several_files_that_are_read_as_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, weights = trained(tmp_path / "saved", source)
    monkeypatch.setattr("common.export.FILE_BYTES", 100_000)
    export_model(saved, source, tmp_path / "out", "float32")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 110_000 for file in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name].detach().numpy(), array)


def test_the_average_is_exported_where_there_is_one(source: Path, tmp_path: Path) -> None:
    _, weights = trained(tmp_path / "saved", source)
    pieces = {kind: {name: whole(array * size) for name, array in weights.items()} for kind, size in SIZES.items()}
    write_state(TrainingState(pieces, 3), tmp_path / "saved")
    for choice, size in (("policy", 1.0), ("ema", 2.0)):
        export_model(tmp_path / "saved", source, tmp_path / "out", "float32", choice)
        assert exported(tmp_path / "out") == ("saved", choice)
        for name, array in load_file(tmp_path / "out" / "model.safetensors").items():
            np.testing.assert_array_equal(array, weights[name] * np.float32(size))
    (tmp_path / "none").mkdir()
    write_state(TrainingState({"model": pieces["model"]}, 3), tmp_path / "none")
    with pytest.raises(
        NotSaved, match=r"none: has no average of the weights \(ema\.decay\)\. Export --weights policy\."
    ):
        export_model(tmp_path / "none", source, tmp_path / "out", "float32", "ema")


def test_bfloat16_rounds_to_nearest_and_the_config_says_so(source: Path, tmp_path: Path) -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 2**-8 + 2**-20, 3e38, -2.5], np.float32)
    export_model(checkpoint(tmp_path / "saved", w=values), source, tmp_path / "out", "bfloat16")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.get_slice("w").get_dtype() == "BF16"
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found[:3].astype(np.float32), [1.0, 1.0, 1 + 2**-7])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_keeps_everything_but_the_dtype(key: str, dtype: Literal["float32", "bfloat16"], tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", **{key: "float16"})
    export_model(trained(tmp_path / "saved", source)[0], source, tmp_path / "out", dtype)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after == {**before, key: dtype}


def test_what_travels_along(source: Path, tmp_path: Path) -> None:
    export_model(trained(tmp_path / "saved", source)[0], source, tmp_path / "out", "float32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"README.md"} | {MARKER}
    for name in names - {"model.safetensors", "config.json", MARKER}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_export_can_be_trained_from(source: Path, tmp_path: Path) -> None:
    export_model(trained(tmp_path / "saved", source)[0], source, tmp_path / "out", "float32")
    ours, theirs = Chat(tmp_path / "out"), Chat(source)
    turns = [Message("user", "hi")]
    assert ours.encode_prompt(turns).tolist() == theirs.encode_prompt(turns).tolist()
    assert (ours.stop_ids, ours.vocabulary) == (theirs.stop_ids, theirs.vocabulary)


def test_an_export_replaces_an_earlier_one(source: Path, tmp_path: Path) -> None:
    saved, weights = trained(tmp_path / "saved", source)
    export_model(checkpoint(tmp_path / "earlier", old=np.ones(2, np.float32)), source, tmp_path / "out", "float32")
    (tmp_path / "out" / "left-over.json").write_text("{}")
    export_model(saved, source, tmp_path / "out", "float32")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()
    assert not (tmp_path / "out" / "left-over.json").exists()


@pytest.mark.parametrize("disk", [small_disk, limited_files])
def test_full_disk_leaves_the_earlier_export_alone(
    disk: Callable[[Path], AbstractContextManager[Path]], source: Path, tmp_path: Path
) -> None:
    small = checkpoint(tmp_path / "small", w=np.ones(2, np.float32))
    large = checkpoint(tmp_path / "large", w=np.ones(2**19, np.float32))
    with disk(tmp_path / "disk") as folder:
        export_model(small, source, folder / "out", "float32")
        with pytest.raises(NotSaved) as caught:
            export_model(large, source, folder / "out", "float32")
        assert [path.name for path in folder.iterdir()] == ["out"]
        np.testing.assert_array_equal(load_file(folder / "out" / "model.safetensors")["w"], np.ones(2, np.float32))
        text = str(caught.value)
        assert text.startswith(f"{folder / 'out'}: could not be written (")
        assert text.endswith("Make room on the disk and run safework export again.")


def test_a_lost_checkpoint_is_not_blamed_on_the_disk(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotSaved, match=r"manifest\.json: is not there, so this is no checkpoint"):
        export_model(tmp_path / "nowhere", source, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["saved", ".", "source", "model"])
def test_what_is_no_earlier_export_is_not_replaced(source: Path, tmp_path: Path, name: str) -> None:
    saved, _ = trained(tmp_path / "saved", source)
    make_model(tmp_path / "model")
    folder = source if name == "source" else tmp_path / name
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(NotSaved, match="exists and is no earlier export, so it stays as it is"):
        export_model(saved, source, folder, "float32")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_refusal_of_the_disk_is_not_called_a_full_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    words = r"out: could not be written \(Not a directory\)\. Mend that and run safework export again\."
    with pytest.raises(NotSaved, match=words):
        export_model(trained(tmp_path / "saved", source)[0], source, tmp_path / "file" / "out", "float32")


def test_an_export_touches_nothing_beside_it(source: Path, tmp_path: Path) -> None:
    saved, _ = trained(tmp_path / "saved", source)
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    for _ in range(2):
        export_model(saved, source, tmp_path / "out", "float32")
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "out", "out.old", "out.partial"}
    assert {path.read_text() for path in tmp_path.glob("out.*/notes.txt")} == {"mine"}


def test_an_export_that_cannot_take_its_place_gives_it_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, weights = trained(tmp_path / "saved", source)
    export_model(saved, source, tmp_path / "out", "float32")
    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(NotSaved, match="Input/output error"):
        export_model(checkpoint(tmp_path / "later", w=np.ones(2, np.float32)), source, tmp_path / "out", "float32")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "later", "out"}


def test_an_export_knows_its_checkpoint(source: Path, tmp_path: Path) -> None:
    assert exported(tmp_path / "out") is None
    export_model(trained(tmp_path / "step-000007", source)[0], source, tmp_path / "out", "float32")
    assert exported(tmp_path / "out") == ("step-000007", "policy")


def test_an_empty_folder_of_any_name_takes_an_export(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export_model(trained(tmp_path / "saved", source)[0], source, Path("."), "float32")
    assert exported(tmp_path / "empty") == ("saved", "policy")
