"""What of a model's config.json is accepted, in both of its forms, and what is refused before an engine opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from common.data.model_config import head_dim, layer_windows, num_kv_heads, read_model_config, rope_table
from common.data.model_folder import model_folder
from tests.tiny import SIZES

LLAMA = {**SIZES, "model_type": "llama"}
QWEN = {**SIZES, "model_type": "qwen2"}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FACTORS = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def folder_with(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def test_old_and_new_rope_forms_say_the_same() -> None:
    plain = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    old = {**plain, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **FACTORS}}
    new = {**plain, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **FACTORS}}
    assert rope_table(old) == rope_table(new) == {"rope_type": "llama3", "rope_theta": 5e5, **FACTORS}
    oldest = {**plain, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **FACTORS}}
    assert rope_table(oldest)["rope_type"] == "llama3"
    unscaled = rope_table({**plain, "rope_scaling": None})
    assert (unscaled["rope_type"], unscaled["rope_theta"]) == ("default", 10_000)
    assert unscaled["original_max_position_embeddings"] == SIZES["max_position_embeddings"]


def test_head_sizes_that_are_not_given_follow_from_the_others() -> None:
    assert (num_kv_heads(LLAMA), head_dim(LLAMA)) == (2, 8)
    assert num_kv_heads({**LLAMA, "num_key_value_heads": None}) == 6
    assert head_dim({**LLAMA, "head_dim": 12}) == 12


def test_windows_follow_layer_types_or_max_window_layers() -> None:
    assert layer_windows({**QWEN, **SLIDING}) == (None, 5, 5)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert layer_windows({**QWEN, **SLIDING, "layer_types": kinds}) == (5, None, 5)
    assert layer_windows({**QWEN, **SLIDING, "use_sliding_window": False}) == (None,) * 3
    assert layer_windows({**LLAMA, **SLIDING}) == (None,) * 3


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, r"model_type = 'gpt2'; supported are llama, qwen2, qwen3\. Choose"),
    ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'; only 'silu'"),
    ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1; .* Set it to 0"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4}; .*original folder"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling\.rope_type = 'dynamic'; .*llama3, yarn"),
    ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.rope_type = 'linea.* needs factor too"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"rope_parameters = .*; one table for all layers"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5; only 1"),
    ({"num_key_value_heads": 4}, r"num_key_value_heads = 4; it must divide num_attention_heads = 6"),
    ({"head_dim": 7}, r"head_dim = 7; it must be even"),
    ({"hidden_size": None}, r"hidden_size = None; it must be a whole number of at least 1"),
    ({"hidden_size": "48"}, r"hidden_size = '48'; it must be a whole number of at least 1"),
    ({"num_key_value_heads": "2"}, r"num_key_value_heads = '2'; it must be a whole number of at least 1"),
    ({"model_type": "qwen2", "num_key_value_heads": None}, r"num_key_value_heads = None; it must be a whole number"),
    ({"model_type": "qwen3"}, r"head_dim = None; it must be a whole number"),
    (
        {"model_type": "qwen3", "head_dim": 8, "layer_types": ["sliding_attention"] * 3},
        r"layer_types = .*each full_attention \(",
    ),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, r"layer_types = .*it must name 3 layers"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_the_engines_do_not_compute_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, json.dumps({**LLAMA, **change}))
    with pytest.raises(ConfigError, match=words):
        model_folder(str(folder))


def test_an_accepted_config_comes_back_whole(tmp_path: Path) -> None:
    settings = {**LLAMA, "quantization_config": None, "partial_rotary_factor": 1.0}
    assert read_model_config(folder_with(tmp_path, json.dumps(settings))) == settings


def test_the_original_length_beside_the_table_comes_before_the_one_in_it() -> None:
    """As in transformers."""
    both = {**LLAMA, "rope_parameters": {"rope_type": "llama3", **FACTORS}, "original_max_position_embeddings": 64}
    assert rope_table(both)["original_max_position_embeddings"] == 64


def test_a_config_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its config\.json holds no table"):
        model_folder(str(folder_with(tmp_path, "[]")))


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its config\.json is not JSON \(.*\)\. Download the model again"):
        model_folder(str(folder_with(tmp_path, "{")))
