"""A model folder's safetensors files: opened, and held against what its `config.json` asks for before an engine loads
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from common.config.section import ConfigError
from common.data.model_config import head_dim, is_classifier, num_classes, num_kv_heads, read_model_config

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SCORE = "score.weight"  # the scalar or classification head of a model that judges

INDEX = "model.safetensors.index.json"

Shape = tuple[int, ...]
_ROWS = 1024  # compared at a time


def open_tensors(folder: Path, files: ExitStack, framework: Literal["np", "pt"] = "np") -> dict[str, Any]:
    """Every tensor's name and the open file that holds it, to be read as NumPy's or torch's; `files` closes them.

    Raises ConfigError, without the folder's name, when a file is missing or damaged.
    """
    tensors, named = {}, _weight_map(folder)
    for shard in _files(folder, named):
        try:
            file = files.enter_context(safe_open(shard, framework))
        except SafetensorError as error:
            raise ConfigError(f"its {shard.name} is damaged ({error}). Download the model again.") from None
        # A tensor that lies in two files is that of the index.
        names = [name for name in list(file.keys()) if named.get(name, shard.name) == shard.name]
        tensors.update(dict.fromkeys(names, file))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Raises ConfigError, without the folder's name, when one is missing."""
    return _files(folder, _weight_map(folder))


def _files(folder: Path, named: Mapping[str, str]) -> list[Path]:
    names = sorted({*named.values()}) or ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"it lacks {name}, and weights are read from safetensors files only. Add the file.")
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, where the folder has an index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"its {index.name} is damaged ({error!r}). Download the model again.") from None


def checked_model(folder: Path) -> dict[str, Any]:
    """The accepted `config.json` of a folder whose tensors fit it, as far as the files' headers tell.

    Raises ConfigError, without the folder's name, for a config.json that `read_model_config` refuses, for tensors that
    are missing, unknown or of another shape, and for a head that differs from the embedding that it is tied to.
    """
    hf = read_model_config(folder)
    with ExitStack() as files:
        tensors = open_tensors(folder, files)
        expected = tensor_shapes(hf)
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in tensors.items()}
        # Older exports hold rotary frequencies, some tied models a copy of the embedding, and classifiers made of a
        # language model still its head.
        copied = {HEAD} & found.keys() if HEAD not in expected else set()
        spare = copied | {name for name in found if name.endswith(".rotary_emb.inv_freq")}
        wrong = [
            f"{name} is {list(found[name])} where config.json asks for {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ]
        problems = {
            "missing": expected.keys() - found.keys(),
            "unexpected": found.keys() - expected.keys() - spare,
            "of the wrong shape": wrong,
        }
        said = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        if said:
            raise ConfigError(f"its tensors do not fit its config.json: {'; '.join(said)}. Correct one of the two.")
        if (
            copied
            and not is_classifier(hf)
            and not _equal(*(tensors[name].get_slice(name) for name in (HEAD, EMBEDDING)))
        ):
            raise ConfigError(
                f"its config.json ties the head to the embedding, but {HEAD} differs from it. "
                f"Set tie_word_embeddings to false, or remove {HEAD}."
            )
    return hf


def _equal(first: Any, second: Any) -> bool:
    """Whether two slices of one shape [N ...] hold the same, of which a part is in memory at a time."""
    [rows, *_] = first.get_shape()
    parts = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    return all(np.array_equal(first[part], second[part]) for part in parts)


def read_score_head(folder: Path) -> np.ndarray:
    """The head of a classifier's folder: float32 [C D]."""
    with ExitStack() as files:
        return open_tensors(folder, files)[SCORE].get_tensor(SCORE).astype(np.float32)


def weights_digest(folder: Path) -> str:
    """SHA-256 over config.json and every safetensors file of a model, names included."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *weight_files(folder)]:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def tensor_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The name and shape of every tensor that an accepted `config.json` asks for."""
    width, vocabulary = hf["hidden_size"], hf["vocab_size"]
    shapes: dict[str, Shape] = {EMBEDDING: (vocabulary, width), "model.norm.weight": (width,)}
    if is_classifier(hf):
        shapes[SCORE] = (num_classes(hf), width)
    elif not hf.get("tie_word_embeddings", False):
        shapes[HEAD] = (vocabulary, width)
    layer = _layer_shapes(hf)
    for index in range(hf["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    family, width, mlp = hf["model_type"], hf["hidden_size"], hf["intermediate_size"]
    queries, keys = hf["num_attention_heads"] * head_dim(hf), num_kv_heads(hf) * head_dim(hf)
    projections = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in projections.items()}
    biased = ("mlp.",) if family == "llama" and hf.get("mlp_bias", False) else ()
    if family == "qwen2":
        biased += tuple(f"self_attn.{kind}_proj" for kind in "qkv")
    elif hf.get("attention_bias", False):
        biased += ("self_attn.",)
    shapes |= {f"{name}.bias": shape[:1] for name, shape in projections.items() if biased and name.startswith(biased)}
    shapes |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    if family == "qwen3":
        shapes |= {f"self_attn.{kind}_norm.weight": (head_dim(hf),) for kind in "qk"}
    return shapes
