"""A model folder and a head -> a folder of a classifier, made of links: what servers and engines load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.config.section import ConfigError
from common.data.embedded_model import default_cache
from common.data.model_config import read_model_config
from common.data.model_weights import HEAD, INDEX, SCORE, weight_files

_HEAD_FILE = "head.safetensors"


def folder_with_head(model: Path, head: Path) -> Path:
    """A folder whose model is that of `model` and whose head is the tensor `score.weight` [C D] of `head`.

    It lies in the cache folder and links to the model's files. Raises ConfigError, without the setting's name, when the
    head's file cannot be read or does not fit the model.
    """
    hf = read_model_config(model)
    classes = _classes(head, hf["hidden_size"])
    key = hashlib.sha256(json.dumps([hf, str(model.resolve())]).encode() + head.read_bytes())
    folder = default_cache() / f"{model.name}-with-head-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".head-", dir=folder.parent) as workshop:
        made = Path(workshop) / "model"
        made.mkdir()
        _link(model, made)
        (made / _HEAD_FILE).write_bytes(head.read_bytes())
        (made / "config.json").write_text(json.dumps(_classifier(hf, classes), indent=2))
        with contextlib.suppress(OSError):  # another process was quicker
            made.rename(folder)
    return folder


def _link(model: Path, made: Path) -> None:
    """Link every file. The weights get other names: transformers would read a `model.safetensors` and no index."""
    shards = {file.name: f"base-{file.name}" for file in weight_files(model)}
    for file in model.iterdir():
        if file.name not in ("config.json", INDEX):
            (made / shards.get(file.name, file.name)).symlink_to(file.resolve())
    index = {SCORE: _HEAD_FILE}
    for shard, link in shards.items():
        with safe_open(model / shard, "np") as file:
            index |= dict.fromkeys(set(file.keys()) - {HEAD}, link)
    (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _classes(head: Path, width: int) -> int:
    try:
        with safe_open(head, "np") as file:
            shape = file.get_slice(SCORE).get_shape()
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{head}: holds no tensor {SCORE} ({reason}). Give a safetensors file that does.") from None
    if len(shape) != 2 or shape[1] != width:
        raise ConfigError(f"{head}: its {SCORE} is {shape}, and the model's hidden states have {width} numbers.")
    return shape[0]


def _classifier(hf: dict[str, Any], classes: int) -> dict[str, Any]:
    names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in hf.get("architectures") or ()]
    labels = {str(index): f"LABEL_{index}" for index in range(classes)}
    return {
        **hf,
        "architectures": names,
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
    }
