"""The training state of either engine on disk: safetensors under Hugging Face names, fp32, bit for bit.

    model.safetensors           parameters
    first_moment.safetensors    AdamW's running mean of gradients
    second_moment.safetensors   AdamW's running mean of squared gradients

Each file's metadata holds the number of optimizer steps taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

STEPS = "optimizer_steps"
_FILES = {
    "parameters": "model.safetensors",
    "first_moment": "first_moment.safetensors",
    "second_moment": "second_moment.safetensors",
}


@dataclass(frozen=True)
class TrainingState:
    """Tensors by Hugging Face name, and the number of optimizer steps behind them."""

    parameters: Mapping[str, np.ndarray]
    first_moment: Mapping[str, np.ndarray]
    second_moment: Mapping[str, np.ndarray]
    optimizer_steps: int


def write_state(state: TrainingState, folder: Path) -> None:
    """Write the three files into a folder that exists. Raises OSError when the disk does."""
    for field, name in _FILES.items():
        tensors = {key: np.asarray(array, order="C") for key, array in vars(state)[field].items()}
        try:
            save_file(tensors, folder / name, {STEPS: str(state.optimizer_steps)})
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"{name}: {error}") from error


def read_parameters(folder: Path) -> dict[str, np.ndarray]:
    """The parameters alone of what `write_state` wrote."""
    return load_file(folder / _FILES["parameters"])


def read_state(folder: Path) -> TrainingState:
    """Read what `write_state` wrote."""
    with safe_open(folder / _FILES["parameters"], "np") as file:
        steps = int(file.metadata()[STEPS])
    return TrainingState(**{field: load_file(folder / name) for field, name in _FILES.items()}, optimizer_steps=steps)
