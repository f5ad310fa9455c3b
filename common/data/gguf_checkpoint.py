"""A llama GGUF file rewritten as a Hugging Face checkpoint: config, tokenizer and fp32 weights, with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_reader import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Metadata = dict[str, Any]  # the file's own keys: "llama.block_count", "tokenizer.ggml.tokens", ...

CONTROL_TOKEN = 3  # the value of `tokenizer.ggml.token_type` for tokens such as <|im_end|>

OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_checkpoint(gguf_file: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and model.safetensors of `gguf_file` into the existing `folder`.

    Weights are float32, their rows in Hugging Face order; tied embeddings are stored once. The file must hold a llama
    with tied embeddings and the SmolLM tokenizer: anything else is an AssertionError, or a KeyError with a tensor name.
    """
    reader = GGUFReader(gguf_file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    assert metadata["general.architecture"] == "llama", metadata["general.architecture"]
    assert metadata["tokenizer.ggml.pre"] == "smollm", metadata["tokenizer.ggml.pre"]

    special_ids = {f"{role}_token_id": metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")}
    special_ids["pad_token_id"] = metadata["tokenizer.ggml.padding_token_id"]
    _write_json(folder / "config.json", llama_config(metadata) | special_ids)
    _write_json(folder / "generation_config.json", special_ids)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    byte_level_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    weights_file = folder / "model.safetensors"
    # transformers loads no safetensors file without a "format".
    save_file(llama_weights(reader.tensors, metadata), weights_file, metadata={"format": "pt"})
    weights_file.chmod(0o644)  # safetensors makes it private; a model server may run as another user


def llama_config(metadata: Metadata) -> dict[str, Any]:
    """The `config.json` of a LlamaForCausalLM with tied embeddings, without the special token ids."""
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // num_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        # The shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """The `tokenizer_config.json`: named special tokens, length limit and chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        # Any other class would rebuild the pre-tokenizer from its own habits instead of reading tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "additional_special_tokens": control_tokens(metadata),
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def control_tokens(metadata: Metadata) -> list[str]:
    """The tokens that no plain text may produce, in the order of their ids."""
    pairs = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    return [token for token, kind in pairs if kind == CONTROL_TOKEN]


def byte_level_tokenizer(metadata: Metadata) -> Tokenizer:
    """The SmolLM tokenizer: every digit alone, then GPT-2's byte-level BPE; nothing is added before or after a text."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    # A token is spelled in the byte alphabet, which has no blank: the one blank of a merge parts its two halves.
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # No unk_token: a byte without a token would otherwise become <|endoftext|>, a control token out of plain text.
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(token, special=True, normalized=False) for token in control_tokens(metadata)]
    tokenizer.add_special_tokens(control)
    assert tokenizer.get_vocab_size() == len(tokens), "a control token is missing from the vocabulary"
    return tokenizer


def llama_weights(tensors: Iterable[ReaderTensor], metadata: Metadata) -> dict[str, np.ndarray]:
    """Every tensor as contiguous float32 under its Hugging Face name: [out in] matrices and [dim] norms."""
    num_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tensors:
        *layer, part, _ = tensor.name.split(".")  # "blk.7.attn_q.weight" or "output_norm.weight"
        weight = dequantize(tensor.data, tensor.tensor_type)
        if part in num_heads:
            weight = unpermute_rotary(weight, num_heads[part])
        name = f"model.layers.{layer[1]}.{LAYER_NAMES[part]}" if layer else OUTER_NAMES[part]
        weights[f"{name}.weight"] = np.ascontiguousarray(weight)  # safetensors writes the buffer, whatever its strides
    return weights


def unpermute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Put query or key rows [heads*head_dim in] back into Hugging Face order.

    A llama GGUF file keeps the two rows of one rotary pair side by side; Hugging Face keeps first all first halves of a
    head, then all second ones. One head of four: rows 0 2 1 3 in the file become 0 1 2 3.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
