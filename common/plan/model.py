"""The model of a plan: its config.json is enough, for its work too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import LoadedConfig, RunConfig
from common.data.model_config import head_dim, num_kv_heads
from common.experiment import policy_config, policy_folder


def planned_model(loaded: LoadedConfig) -> dict[str, Any]:
    """The accepted config.json of `model.path`, of a folder without weights too. Raises ConfigError naming the key."""
    folder = Path(os.path.expanduser(loaded.config.model.path))
    if not (folder / "config.json").is_file():
        folder = policy_folder(loaded)
    return policy_config(loaded, folder)


def frozen_notes(config: RunConfig) -> tuple[str, ...]:
    """What must be known of the work and the bytes sent where tensors are frozen."""
    if not config.model.frozen:
        return ()
    return ("Work, floor and bytes sent are those of a run that trains every tensor; with model.frozen it is less.",)


def forward_flops(hf: Mapping[str, Any], rows: int, tokens: int) -> float:
    """Products of one forward pass with logits for every token, and causal attention, each row being one sequence."""
    mixing, keys = 2 * hf["num_attention_heads"] * head_dim(hf), 2 * num_kv_heads(hf) * head_dim(hf)
    layer = hf["hidden_size"] * (mixing + keys + 3 * hf["intermediate_size"])
    products = 2 * (hf["num_hidden_layers"] * layer + hf["vocab_size"] * hf["hidden_size"])
    return float(rows * tokens * (products + hf["num_hidden_layers"] * mixing * tokens))
