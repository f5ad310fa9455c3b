"""What the decoder needs to know of a model, read from its Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.data.model_config import head_dim, is_classifier, layer_windows, num_kv_heads
from safework_jax.models.decoder.rope import Rope, rope_from_hf

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
        """From a `config.json` that `common/data/model_config.py` has read and accepted."""
        model_type = hf["model_type"]
        attention_bias = model_type in ("llama", "qwen3") and bool(hf.get("attention_bias", False))
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_dim=hf["hidden_size"],
            mlp_dim=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=num_kv_heads(hf),
            head_dim=head_dim(hf),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=rope_from_hf(hf),
            windows=tuple(NO_WINDOW if window is None else window for window in layer_windows(hf)),
            qkv_bias=attention_bias or model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=model_type == "llama" and bool(hf.get("mlp_bias", False)),
            query_key_norm=model_type == "qwen3",
            # A classifier has no head over the vocabulary: none is made when it would be the embedding.
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)) or is_classifier(hf),
        )
