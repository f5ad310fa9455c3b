"""A checkpoint of either engine -> a Hugging Face folder that loads on its own, a file at a time."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from common.disk import NotSaved, flush_to_disk, not_written
from common.state_files import SavedState, open_state, save_tensors
from common.types import Kind

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
# In each export: which checkpoint it is of. A folder without it is somebody's own and never replaced.
MARKER = "safework_export.json"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
Weights = Literal["policy", "ema"]
_KINDS: dict[Weights, Kind] = {"policy": "model", "ema": "ema"}
FILE_BYTES = 5 * 10**9  # of tensors in one file, as long as one tensor is not larger


def export_model(
    checkpoint: Path, source: Path, folder: Path, dtype: Literal["float32", "bfloat16"], weights: Weights = "policy"
) -> None:
    """Write the policy of a checkpoint or its average, cast to `dtype`, with all else from `source`, the model trained
    from.

    Raises NotSaved when the disk refuses, when the checkpoint cannot be read or has no average, and when `folder` holds
    anything but an earlier export; it then stays as it was.
    """
    folder = folder.expanduser().resolve()
    if not _may_be_replaced(folder):
        raise NotSaved(f"{folder}: exists and is no earlier export, so it stays as it is. Name another folder.")
    try:
        if not folder.parent.exists():  # a file there is for the next line to name: mkdir would say that it exists
            folder.parent.mkdir(parents=True, exist_ok=True)
        # A place of its own beside the folder: another export may run at the same time.
        scratch_folder = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
        with scratch_folder as scratch, open_state(checkpoint) as saved:
            if _KINDS[weights] not in saved.kinds:
                raise NotSaved(f"{checkpoint}: has no average of the weights (ema.decay). Export --weights policy.")
            new = Path(scratch) / "new"
            new.mkdir()
            _write_tensors(saved, new, dtype, weights)
            _write_companions(source, new, dtype)
            (new / MARKER).write_text(
                json.dumps({"checkpoint": checkpoint.name, "dtype": dtype, "weights": weights}) + "\n"
            )
            flush_to_disk(new)
            _put_in_place(new, folder, Path(scratch) / "old")
    except OSError as error:
        raise not_written(folder, error, "run safework export again") from error


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Rename `new` to `folder`; what was there moves to `old`, and back when that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def _may_be_replaced(folder: Path) -> bool:
    """Whether nothing would be lost: there is no such folder, or an empty one, or an earlier export."""
    if not folder.exists() or (folder / MARKER).is_file():
        return True
    return folder.is_dir() and not any(folder.iterdir())


def exported(folder: Path) -> tuple[str, Weights] | None:
    """The name of the checkpoint that an export is of, and of which of its weights; None when there is no complete
    export.
    """
    marker = folder / MARKER
    if not marker.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(marker.read_text())
        return said["checkpoint"], said["weights"]
    return None  # damaged: made anew


def _write_tensors(saved: SavedState, folder: Path, dtype: str, weights: Weights) -> None:
    """The weights, in one file or, as Hugging Face lays them out, in several with an index."""
    size = np.dtype(DTYPES[dtype]).itemsize
    groups = list(_files({name: size * math.prod(shape) for name, shape in saved.shapes.items()}))
    weight_map = {}
    for number, names in enumerate(groups, 1):
        several = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        file = f"model{several}.safetensors"
        tensors = {name: saved.read(_KINDS[weights], name).astype(DTYPES[dtype], copy=False) for name in names}
        save_tensors(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(size * math.prod(shape) for shape in saved.shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _files(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in order, in groups of at most FILE_BYTES or of one."""
    names, total = [], 0
    for name, size in sizes.items():
        if names and total + size > FILE_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write_companions(source: Path, folder: Path, dtype: str) -> None:
    hf = json.loads((source / "config.json").read_text())
    # transformers loads in the dtype named here; it was `torch_dtype` before version 5.
    hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
