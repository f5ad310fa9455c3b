"""Where a model lives: a local Hugging Face folder, a hub name, or the embedded model -> a local folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from common.config.section import ConfigError
from common.data.head_folder import folder_with_head
from common.data.model_weights import checked_model

EMBEDDED = "embedded:"
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(path: str) -> Path:
    """The local folder of a model. Fetches the embedded model or a hub snapshot when it is not there yet.

    Raises ConfigError, without the setting's name, when there is no such folder, or its config.json is missing or asks
    for a model that the engines do not compute, or its weights do not fit it.
    """
    if path.startswith(EMBEDDED):
        return _embedded(path.removeprefix(EMBEDDED))
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir() and _HUB_NAME.fullmatch(path):
        folder = _hub_snapshot(path, ["*.safetensors", *_TOKENIZER_FILES])
    if not (folder / "config.json").is_file():
        state = "holds no config.json" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{state}. Give a Hugging Face model folder, a hub name (owner/model), or {EMBEDDED}smollm2.")
    checked_model(folder)
    return folder


def judge_folder(path: str, head: str | None) -> Path:
    """The local folder of a judge's model: that of `path`, with the head of a file on top where there is one.

    Raises ConfigError, without the setting's name, as `model_folder` does, and for a head that does not fit.
    """
    return model_folder(path) if head is None else folder_with_head(model_folder(path), Path(os.path.expanduser(head)))


def tokenizer_folder(path: str) -> Path:
    """The local folder of a model's tokenizer, for a model that runs elsewhere: its weights are not read.

    Raises ConfigError, without the setting's name, when there is no such folder.
    """
    if path.startswith(EMBEDDED):
        return _embedded(path.removeprefix(EMBEDDED))
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir() and _HUB_NAME.fullmatch(path):
        folder = _hub_snapshot(path, _TOKENIZER_FILES)
    if not folder.is_dir():
        raise ConfigError(f"no such folder. Give a Hugging Face model folder, a hub name, or {EMBEDDED}smollm2.")
    return folder


def engine_path(path: str, head: str | None) -> str:
    """A judge's model as a server's engine is given it: as it is written, but for `~`, for the embedded models, which
    only this program knows, and for a model with a head of the user's own, which is a folder made here.

    Raises ConfigError, without the setting's name, when there is no such model.
    """
    if head is not None:
        return str(judge_folder(path, head))
    return str(tokenizer_folder(path)) if path.startswith(EMBEDDED) else os.path.expanduser(path)


def _embedded(name: str) -> Path:
    from common.data.embedded_model import ModelUnavailable, embedded_model

    try:
        return embedded_model(name)
    except (ModelUnavailable, ValueError) as error:
        raise ConfigError(str(error)) from None


def _hub_snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"no such local folder, and the hub could not be asked ({reason}). "
            "Download the model and give its folder, or check the name and the network."
        ) from None
