"""A head on a model: the folder that engines and servers load, made of links."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.config import ConfigError
from common.data.head_folder import folder_with_head
from common.data.model_folder import judge_folder
from common.data.model_weights import checked_model, read_score_head, weights_digest
from tests.tiny import make_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAFEWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_head(file: Path, classes: int = 8, width: int = 48, seed: int = 0) -> Path:
    weight = np.random.default_rng(seed).normal(size=(classes, width)).astype(np.float16)
    save_file({"score.weight": weight}, file)
    return file


def split_into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_folder_is_a_classifier_of_the_same_weights(tmp_path: Path, tied: bool, sharded: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    if sharded:
        split_into_shards(model)
    head = make_head(tmp_path / "head.safetensors")
    folder = folder_with_head(model, head)
    assert checked_model(folder)["architectures"] == ["LlamaForSequenceClassification"]
    np.testing.assert_array_equal(read_score_head(folder), load_file(head)["score.weight"].astype(np.float32))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    np.testing.assert_array_equal(loaded.score.weight.detach().numpy(), read_score_head(folder))
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name)), name


def test_it_is_made_once_for_each_model_and_head(tmp_path: Path, cache: Path) -> None:
    model, other = make_model(tmp_path / "model"), make_model(tmp_path / "other", seed=1)
    head, trained_on = make_head(tmp_path / "a.safetensors"), make_head(tmp_path / "b.safetensors", seed=1)
    folders = [folder_with_head(*pair) for pair in ((model, head), (model, head), (model, trained_on), (other, head))]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    assert len({weights_digest(folder) for folder in folders}) == 3
    assert sorted(path.name for path in cache.iterdir()) == sorted({folder.name for folder in folders})


def test_without_a_head_it_is_the_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert judge_folder(str(model), None) == model
    assert judge_folder(str(model), str(make_head(tmp_path / "head.safetensors"))) != model


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    wrong = {"width": make_head(tmp_path / "wide.safetensors", width=64), "no file": tmp_path / "none.safetensors"}
    save_file({"weight": np.zeros((2, 48), np.float32)}, tmp_path / "name.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing that could be read")
    with pytest.raises(ConfigError, match=r"its score.weight is \[8, 64\], and the model's hidden states have 48"):
        folder_with_head(model, wrong["width"])
    for file in (wrong["no file"], tmp_path / "name.safetensors", tmp_path / "damaged.safetensors"):
        with pytest.raises(ConfigError, match=r"holds no tensor score\.weight"):
            folder_with_head(model, file)
