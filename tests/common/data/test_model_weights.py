"""What a model folder's tensors must be: those that its config.json asks for, no others, of the right shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from common.config import ConfigError
from common.data.model_config import read_model_config
from common.data.model_folder import model_folder
from common.data.model_weights import tensor_shapes
from tests.tiny import make_model

NORM = "model.norm.weight"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": None, "head_dim": 12}),
    ("qwen2", {"attention_bias": False}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_shapes_are_those_of_transformers(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", model_type)
    settings = {**read_model_config(model), **changes}
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    assert tensor_shapes(settings) == expected


def damaged(tmp_path: Path, **tensors: np.ndarray) -> str:
    """What is said of a tied model some of whose tensors were replaced."""
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors") | tensors
    save_file({name: array for name, array in weights.items() if array.size}, model / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        model_folder(str(model))
    return str(caught.value)


def test_tensors_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    wide, none = np.ones(49, np.float32), np.ones(0, np.float32)
    assert damaged(tmp_path, **{NORM: wide, "model.layers.0.mlp.up_proj.weight": none, "extra": wide}) == (
        "its tensors do not fit its config.json: 1 missing: model.layers.0.mlp.up_proj.weight; 1 unexpected: extra; "
        "1 of the wrong shape: model.norm.weight is [49] where config.json asks for [48]. Correct one of the two."
    )


def test_a_tied_head_may_be_there_but_not_differ(tmp_path: Path) -> None:
    model = make_model(tmp_path / "same", tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file({**weights, **frequencies, "lm_head.weight": head}, model / "model.safetensors")
    assert model_folder(str(model)) == model
    assert "ties the head to the embedding, but lm_head.weight differs" in damaged(
        tmp_path, **{"lm_head.weight": head + 1}
    )


@pytest.mark.parametrize("text", ["{bad", "{}", '{"weight_map": [1]}', "[]", "7"])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (make_model(tmp_path / "model") / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"its model\.safetensors\.index\.json is damaged \(.*\)\. Download the model"
    ):
        model_folder(str(tmp_path / "model"))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    file = make_model(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"its model\.safetensors is damaged \(.*\)\. Download the model again"):
        model_folder(str(tmp_path / "model"))
    file.unlink()
    with pytest.raises(ConfigError, match=r"it lacks model\.safetensors, and weights are read from safetensors"):
        model_folder(str(tmp_path / "model"))
