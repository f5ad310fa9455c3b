"""A checkpoint of either engine -> a Hugging Face folder that loads on its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from common.run_dir import NotSaved
from common.state_files import read_parameters, save_tensors

# What travels with the weights, beside config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*processor_config.json",
)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def export_model(checkpoint: Path, source: Path, folder: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Write the parameters of a checkpoint, cast to `dtype`, with all else from `source`, the model trained from.

    Raises NotSaved when the disk refuses; an earlier export of the name `folder` then stays as it was.
    """
    parameters = read_parameters(checkpoint)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_folder(parameters, source, partial, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise NotSaved(
            f"{folder}: could not be written ({error.strerror or error}). "
            "Make room on the disk and run safework export again."
        ) from error


def _write_folder(parameters: dict[str, np.ndarray], source: Path, folder: Path, dtype: str) -> None:
    tensors = {name: array.astype(DTYPES[dtype], copy=False) for name, array in parameters.items()}
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    hf = json.loads((source / "config.json").read_text())
    # transformers loads in the dtype named here; it was `torch_dtype` before version 5.
    hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
