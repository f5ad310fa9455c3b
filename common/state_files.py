"""The training state of either engine on disk: safetensors under Hugging Face names, fp32, bit for bit.

    model.safetensors           parameters
    first_moment.safetensors    AdamW's running mean of gradients
    second_moment.safetensors   AdamW's running mean of squared gradients

Each file's metadata holds the number of optimizer steps taken.
"""

from __future__ import annotations

import os
import re
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
        save_tensors(vars(state)[field], folder / name, {STEPS: str(state.optimizer_steps)})


def save_tensors(tensors: Mapping[str, np.ndarray], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, readable as any new file is. Raises OSError when the disk refuses."""
    try:
        save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, file, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error
    # The library makes its file for the owner alone.
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def drop_moments(folder: Path) -> None:
    """Remove all but the parameters of what `write_state` wrote."""
    for field in ("first_moment", "second_moment"):
        (folder / _FILES[field]).unlink()


def read_parameters(folder: Path) -> dict[str, np.ndarray]:
    """The parameters alone of what `write_state` wrote."""
    return load_file(folder / _FILES["parameters"])


def read_state(folder: Path) -> TrainingState:
    """Read what `write_state` wrote."""
    with safe_open(folder / _FILES["parameters"], "np") as file:
        steps = int(file.metadata()[STEPS])
    return TrainingState(**{field: load_file(folder / name) for field, name in _FILES.items()}, optimizer_steps=steps)
