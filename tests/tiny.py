"""Tiny random models as Hugging Face folders, made without an engine: real families and tokenizers, small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def make_model(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a model folder with random weights and a byte-level tokenizer; `changes` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SIZES, "model_type": model_type, "architectures": [f"{FAMILIES[model_type]}ForCausalLM"], **changes}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    save_file(random_weights(config, seed), folder / "model.safetensors", {"format": "pt"})
    make_tokenizer(folder)
    return folder


def make_classifier(folder: Path, model_type: str = "llama", classes: int = 6, **changes: Any) -> Path:
    """A model folder that ends in a head of `classes` outputs."""
    make_model(folder, model_type, tie_word_embeddings=True, **changes)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["architectures"] = [f"{FAMILIES[model_type]}ForSequenceClassification"]
    config["id2label"] = {str(index): f"LABEL_{index}" for index in range(classes)}
    file.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(classes)
    weights["score.weight"] = rng.normal(0.0, 0.3, (classes, config["hidden_size"])).astype(np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_speaker(folder: Path, text: str, model_type: str = "qwen2", **likely: float) -> Path:
    """A model folder that says `text`, whose characters differ, to whatever it is asked, and then stops.

    `likely` gives other first characters their logit, a little of which depends on what was asked. Hidden states are
    the last token, one-hot, and a trace of all tokens before it, which attention adds.
    """
    make_model(folder, model_type, hidden_size=320, num_hidden_layers=1, max_position_embeddings=8192, head_dim=64)
    file = folder / "model.safetensors"
    weights = {name: np.zeros_like(value) for name, value in load_file(file).items()}
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            value[:] = 1.0
        elif name.endswith(("v_proj.weight", "o_proj.weight")):
            value[:] = rng.normal(0.0, 0.05, value.shape)
    weights["model.embed_tokens.weight"][:] = np.eye(320)
    ids = _byte_ids(folder)
    said = [ids["\n"], *(ids[character] for character in text), SIZES["eos_token_id"]]
    assert len(set(said)) == len(said), text
    head = weights["lm_head.weight"]
    head[said[1:], said[:-1]] = 20.0 / np.sqrt(320)
    for character, logit in likely.items():
        head[ids[character]] = rng.normal(0.0, 0.02, 320)
        head[ids[character], ids["\n"]] = logit / np.sqrt(320)
    save_file(weights, file, {"format": "pt"})
    return folder


def _byte_ids(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {chr(byte): tokenizer.encode(chr(byte), add_special_tokens=False).ids[0] for byte in range(128)}


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Weights by Hugging Face name, large enough that every part of the model matters."""
    rng = np.random.default_rng(seed)
    dim, mlp = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (queries, dim),
            f"{prefix}.self_attn.k_proj.weight": (keys, dim),
            f"{prefix}.self_attn.v_proj.weight": (keys, dim),
            f"{prefix}.self_attn.o_proj.weight": (dim, queries),
            f"{prefix}.mlp.gate_proj.weight": (mlp, dim),
            f"{prefix}.mlp.up_proj.weight": (mlp, dim),
            f"{prefix}.mlp.down_proj.weight": (dim, mlp),
        }
        if config["model_type"] == "qwen2":
            sizes = {"q": queries, "k": keys, "v": keys}
            shapes |= {f"{prefix}.self_attn.{kind}_proj.bias": (size,) for kind, size in sizes.items()}
    weights = {name: rng.normal(0.0, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}
    return weights | _norms(config, rng)


def _norms(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = {"model.norm.weight": config["hidden_size"]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sizes[f"{prefix}.input_layernorm.weight"] = config["hidden_size"]
        sizes[f"{prefix}.post_attention_layernorm.weight"] = config["hidden_size"]
        if config["model_type"] == "qwen3":
            sizes[f"{prefix}.self_attn.q_norm.weight"] = config["head_dim"]
            sizes[f"{prefix}.self_attn.k_norm.weight"] = config["head_dim"]
    return {name: rng.normal(1.0, 0.1, size).astype(np.float32) for name, size in sizes.items()}


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with ChatML: three control tokens, then the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=CONTROL[0],
        eos_token=CONTROL[2],
        pad_token=CONTROL[0],
        additional_special_tokens=list(CONTROL),
        chat_template=CHATML,
    )
    fast.save_pretrained(folder)
