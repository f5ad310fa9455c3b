"""What the decoder needs to know of a model, read from its Hugging Face `config.json` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config import ConfigError
from safework_jax.models.decoder.rope import Rope, rope_from_hf

MODEL_TYPES = ("llama", "qwen2", "qwen3")
# The window of a layer that sees everything: wider than any sequence, so that all layers run the same program.
NO_WINDOW = 2**30


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one decoder; hashable, so that it can be a static argument of jit.

    windows: one per layer; a token sees those whose position is less than this far behind its own.
    """

    vocab_size: int
    hidden_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    windows: tuple[int, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    tied_embeddings: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """Read a parsed `config.json`; anything this decoder would compute differently is a ConfigError."""
        _refuse_unsupported(hf)
        model_type = hf["model_type"]
        num_heads = _size(hf, "num_attention_heads")
        num_kv_heads = hf.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads = {num_kv_heads} (config.json) must divide num_attention_heads = {num_heads}."
            )
        hidden_dim = _size(hf, "hidden_size")
        head_dim = hf.get("head_dim") or hidden_dim // num_heads
        if head_dim % 2:
            raise ConfigError(f"head_dim = {head_dim} (config.json) must be even: rotary embedding turns pairs.")
        attention_bias = model_type in ("llama", "qwen3") and bool(hf.get("attention_bias", False))
        return cls(
            vocab_size=_size(hf, "vocab_size"),
            hidden_dim=hidden_dim,
            mlp_dim=_size(hf, "intermediate_size"),
            num_layers=_size(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=rope_from_hf(hf, head_dim),
            windows=_windows(hf),
            qkv_bias=attention_bias or model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=model_type == "llama" and bool(hf.get("mlp_bias", False)),
            query_key_norm=model_type == "qwen3",
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type = {model_type!r} (config.json): allowed are {', '.join(MODEL_TYPES)}.")
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act = {activation!r} (config.json): only 'silu' is allowed.")
    dropout = hf.get("attention_dropout")
    if dropout:
        raise ConfigError(f"attention_dropout = {dropout!r} (config.json): only 0 is allowed; set it to 0.")
    quantization = hf.get("quantization_config")
    if quantization is not None:
        raise ConfigError(
            f"quantization_config = {quantization!r} (config.json): quantised weights cannot be trained; "
            "use the model's unquantised folder."
        )


def _size(hf: Mapping[str, Any], field: str) -> int:
    value = hf.get(field)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{field} = {value!r} (config.json): a whole number of at least 1 is needed.")
    return value


def _windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """One window per layer, by each family's own rule; 4096 and 28 are the families' defaults."""
    num_layers = hf["num_hidden_layers"]
    if hf["model_type"] == "llama":
        return (NO_WINDOW,) * num_layers
    slides = bool(hf.get("use_sliding_window", False)) and hf.get("sliding_window", 4096) is not None
    window = hf.get("sliding_window", 4096) if slides else NO_WINDOW
    first_sliding = hf.get("max_window_layers", 28) if slides else num_layers
    layer_types = hf.get("layer_types") or [
        "sliding_attention" if layer >= first_sliding else "full_attention" for layer in range(num_layers)
    ]
    allowed = ("full_attention", "sliding_attention") if slides else ("full_attention",)
    wrong = sorted(set(layer_types) - set(allowed))
    if wrong or len(layer_types) != num_layers:
        raise ConfigError(
            f"layer_types (config.json) has {len(layer_types)} entries, among them {wrong}: it must hold {num_layers}, "
            f"each one of {', '.join(allowed)} (use_sliding_window and sliding_window decide whether layers may slide)."
        )
    return tuple(window if kind == "sliding_attention" else NO_WINDOW for kind in layer_types)
