"""The model of a plan: its config.json is enough, for its work too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import ConfigError, LoadedConfig
from common.config.sentences import blamed
from common.data.model_config import head_dim, is_classifier, num_kv_heads, read_model_config
from common.experiment import policy_folder


def planned_model(loaded: LoadedConfig) -> dict[str, Any]:
    """The accepted config.json of `model.path`, of a folder without weights too. Raises ConfigError naming the key."""
    path = loaded.config.model.path
    folder = Path(os.path.expanduser(path))
    if not (folder / "config.json").is_file():
        folder = policy_folder(loaded)
    with blamed("model.path", path, loaded.origin):
        hf = read_model_config(folder)
        if is_classifier(hf):
            raise ConfigError("has a classification head and cannot write. Choose a causal language model.")
        return hf


def forward_flops(hf: Mapping[str, Any], rows: int, tokens: int) -> float:
    """Products of one forward pass with logits for every token, and causal attention, each row being one sequence."""
    mixing, keys = 2 * hf["num_attention_heads"] * head_dim(hf), 2 * num_kv_heads(hf) * head_dim(hf)
    layer = hf["hidden_size"] * (mixing + keys + 3 * hf["intermediate_size"])
    products = 2 * (hf["num_hidden_layers"] * layer + hf["vocab_size"] * hf["hidden_size"])
    return float(rows * tokens * (products + hf["num_hidden_layers"] * mixing * tokens))
