"""The one table between Hugging Face's tensor names and the paths of our parameters."""

from __future__ import annotations

_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INNER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def is_stacked(path: str) -> bool:
    """Whether the parameter at this path has a leading layer dimension."""
    return path.startswith("layers.")


def tensor_names(path: str, num_layers: int) -> list[str]:
    """The tensors that make up one parameter, one per layer where it is stacked.

    `layers.mlp.up.weight` -> `model.layers.0.mlp.up_proj.weight`, `model.layers.1.mlp.up_proj.weight`, ...
    """
    module, _, kind = path.removeprefix("layers.").rpartition(".")
    if not is_stacked(path):
        return [f"{_OUTER[module]}.{kind}"]
    return [f"model.layers.{layer}.{_INNER[module]}.{kind}" for layer in range(num_layers)]
