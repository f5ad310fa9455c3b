"""A model folder's `config.json`: read, and refused where an engine would compute something else than it asks for.

Both engines serve the same models, so that what one trains the other can go on with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config.section import ConfigError

# Families whose attention, rotary embedding and head were checked against Hugging Face on packed rows.
FAMILIES = ("llama", "qwen2", "qwen3")

# Rotary embeddings whose angles depend on a token's position alone, and what each needs in its table.
_SCALED = ("factor", "original_max_position_embeddings")
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": (*_SCALED, "low_freq_factor", "high_freq_factor"),
    "yarn": _SCALED,
}
# Sizes that must be given. transformers has numbers of its own for what Qwen leaves out.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FAMILY_SIZES = {"llama": (), "qwen2": ("num_key_value_heads",), "qwen3": ("num_key_value_heads", "head_dim")}
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")


def read_model_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder.

    Raises ConfigError, without the folder's name, for what is not JSON, another family, quantised weights, active
    dropout, and sizes, rotary embeddings or attention windows that the engines do not compute.
    """
    hf = read_any_model_config(folder)
    _check_family(hf)
    _check_sizes(hf)
    _check_rope(hf)
    layer_windows(hf)
    return hf


def read_any_model_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model that runs elsewhere, whatever its family.

    Raises ConfigError, without the folder's name, when there is none or it holds no table.
    """
    try:
        hf = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ConfigError("holds no config.json. Give a Hugging Face model folder.") from None
    except ValueError as error:
        raise ConfigError(f"its config.json is not JSON ({error}). Download the model again.") from None
    if not isinstance(hf, dict):
        raise ConfigError("its config.json holds no table. Download the model again.")
    return hf


def _refusal(field: str, value: object, problem: str) -> ConfigError:
    return ConfigError(f"its config.json says {field} = {value!r}; {problem}.")


def _check_family(hf: Mapping[str, Any]) -> None:
    allowed = f"supported are {', '.join(FAMILIES)}. Choose a model of these"
    if hf.get("model_type") not in FAMILIES:
        raise _refusal("model_type", hf.get("model_type"), allowed)
    if hf.get("quantization_config") is not None:
        remedy = "quantised weights cannot be trained. Use the model's original folder"
        raise _refusal("quantization_config", hf["quantization_config"], remedy)
    if hf.get("hidden_act", "silu") != "silu":
        raise _refusal("hidden_act", hf["hidden_act"], "only 'silu' is supported. Choose another model")
    if hf.get("attention_dropout"):
        remedy = "sampling and training would see different models. Set it to 0"
        raise _refusal("attention_dropout", hf["attention_dropout"], remedy)


def _check_sizes(hf: Mapping[str, Any]) -> None:
    given = [field for field in _OPTIONAL_SIZES if hf.get(field) is not None]
    for field in (*_SIZES, *_FAMILY_SIZES[hf["model_type"]], *given):
        if not isinstance(hf.get(field), int) or hf[field] < 1:
            raise _refusal(field, hf.get(field), "it must be a whole number of at least 1. Correct it")
    if hf["num_attention_heads"] % num_kv_heads(hf):
        problem = f"it must divide num_attention_heads = {hf['num_attention_heads']}. Correct it"
        raise _refusal("num_key_value_heads", num_kv_heads(hf), problem)
    if head_dim(hf) % 2:
        raise _refusal("head_dim", head_dim(hf), "it must be even, because rotary embedding turns pairs. Correct it")


def is_classifier(hf: Mapping[str, Any]) -> bool:
    """Whether the model ends in a scalar or classification head instead of one over the vocabulary."""
    return any(str(name).endswith("ForSequenceClassification") for name in hf.get("architectures") or ())


def num_classes(hf: Mapping[str, Any]) -> int:
    """Outputs of a classifier's head; transformers' own default where the config does not say."""
    return len(hf.get("id2label") or ()) or hf.get("num_labels") or 2


def context_length(hf: Mapping[str, Any]) -> float:
    """Tokens that the model was made for; without limit where the config does not say. Rotary scaling stretches it, and
    newer configs say the stretched length.
    """
    stated = hf.get("max_position_embeddings")
    if not stated:
        return math.inf
    rope = rope_table(hf)
    return max(stated, (rope["original_max_position_embeddings"] or stated) * rope.get("factor", 1))


def num_kv_heads(hf: Mapping[str, Any]) -> int:
    """Heads of keys and values; all of them where the config does not say."""
    return hf.get("num_key_value_heads") or hf["num_attention_heads"]


def head_dim(hf: Mapping[str, Any]) -> int:
    """Width of a head; an equal share of the model's where the config does not say."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def rope_table(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, or the older `rope_theta` and `rope_scaling`, as one table with rope_type and rope_theta."""
    table = {
        "original_max_position_embeddings": hf.get("max_position_embeddings"),
        **(hf.get("rope_scaling") or hf.get("rope_parameters") or {}),
    }
    if hf.get("original_max_position_embeddings"):
        table["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    table["rope_type"] = table.get("rope_type", table.get("type", "default"))
    table["rope_theta"] = float(table.get("rope_theta") or hf.get("rope_theta") or 10_000)
    return table


def _check_rope(hf: Mapping[str, Any]) -> None:
    field, table = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters", rope_table(hf)
    nested = [name for name, value in table.items() if isinstance(value, Mapping)]
    if nested:
        raise _refusal(field, hf[field], "one table for all layers is supported. Choose another model")
    if table["rope_type"] not in ROPE_TYPES:
        allowed = f"supported are {', '.join(ROPE_TYPES)}. Choose one of these"
        raise _refusal(f"{field}.rope_type", table["rope_type"], allowed)
    rotated_part = table.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if rotated_part not in (None, 1):
        raise _refusal("partial_rotary_factor", rotated_part, "only 1, all of a head, is supported")
    missing = [name for name in ROPE_TYPES[table["rope_type"]] if table.get(name) is None]
    if missing:
        problem = f"this rotary embedding needs {', '.join(missing)} too. Add what is missing"
        raise _refusal(f"{field}.rope_type", table["rope_type"], problem)


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """How far back each layer sees, in tokens, by each family's own rule; None: to the start of the sequence.

    Raises ConfigError for layer types that the family does not have or that lack a window.
    """
    num_layers = hf["num_hidden_layers"]
    if hf["model_type"] == "llama":
        return (None,) * num_layers
    # 4096 and 28 are the families' defaults.
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first_sliding = num_layers if window is None else hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if layer >= first_sliding else "full_attention" for layer in range(num_layers)
    ]
    allowed = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if len(kinds) != num_layers or not set(kinds) <= set(allowed):
        problem = (
            f"it must name {num_layers} layers, each {' or '.join(allowed)} (a layer may slide where "
            "use_sliding_window is true and sliding_window is a number). Correct one of them"
        )
        raise _refusal("layer_types", kinds, problem)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
