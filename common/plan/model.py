"""The model of a plan: its config.json is enough."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.config import LoadedConfig
from common.config.sentences import blamed
from common.data.model_config import read_model_config
from common.experiment import policy_folder


def planned_model(loaded: LoadedConfig) -> dict[str, Any]:
    """The accepted config.json of `model.path`, of a folder without weights too. Raises ConfigError naming the key."""
    path = loaded.config.model.path
    folder = Path(os.path.expanduser(path))
    if not (folder / "config.json").is_file():
        folder = policy_folder(loaded)
    with blamed("model.path", path, loaded.origin):
        return read_model_config(folder)
