"""The rotary embedding that a Hugging Face config asks for, reduced to one frequency per pair of head dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from common.data.model_config import head_dim, rope_table


class Rope(NamedTuple):
    """frequencies: radians per position for each of the head_dim / 2 pairs. scale: length given to a rotated vector."""

    frequencies: tuple[float, ...]
    scale: float


def rope_from_hf(hf: Mapping[str, Any]) -> Rope:
    """The rotary embedding of an accepted `config.json`. Computed in float32, as the models were."""
    rope, width = rope_table(hf), head_dim(hf)
    rope_type, theta = rope["rope_type"], rope["rope_theta"]
    frequencies = 1 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)
    scale = 1.0
    if rope_type == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope_type == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope_type == "yarn":
        frequencies, scale = _yarn(frequencies, rope, theta)
    return Rope(tuple(frequencies.astype(np.float32).tolist()), scale)


def _llama3(frequencies: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Slow pairs are stretched by `factor`, fast ones kept; a pair is judged by its turns over the original context."""
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])


def _yarn(frequencies: np.ndarray, rope: Mapping[str, Any], theta: float) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): a linear ramp over the pairs from kept to stretched, and longer rotated vectors."""
    num_pairs = len(frequencies)

    def pair_with(turns: float) -> float:
        context = rope["original_max_position_embeddings"]
        return num_pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    stretched = np.clip((np.arange(num_pairs, dtype=np.float32) - first) / max(last - first, 0.001), 0, 1)
    frequencies = frequencies * (1 - stretched + stretched / rope["factor"])
    return frequencies, _yarn_scale(rope)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    def length(weight: float) -> float:
        return 1 + 0.1 * weight * math.log(max(rope["factor"], 1))

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return length(rope["mscale"]) / length(rope["mscale_all_dim"])
    return length(1)
