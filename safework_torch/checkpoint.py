"""Training state between torch and the files of `common/state_files.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.state_files import TrainingState, read_state, write_state
from safework_torch.optimizer import AdamW
from safework_torch.processes import own_rows
from safework_torch.sharding import full, shard_like


def save_state(optimizer: AdamW, folder: Path) -> None:
    """Write parameters and AdamW moments into a folder: every process gives its shards, the first one writes. Raises
    OSError when the disk does.
    """
    tensors = (optimizer.named, optimizer.first_moment, optimizer.second_moment)
    weights, first, second = map(_host, tensors)
    if own_rows().number == 0:
        write_state(TrainingState(weights, first, second, optimizer.steps), folder)


def _host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: full(tensor.detach()).cpu().numpy() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_state(optimizer: AdamW, folder: Path) -> None:
    """Read back what `save_state` wrote."""
    state = read_state(folder)
    for targets, arrays in (
        (optimizer.named, state.parameters),
        (optimizer.first_moment, state.first_moment),
        (optimizer.second_moment, state.second_moment),
    ):
        for name, tensor in targets.items():
            tensor.copy_(shard_like(torch.from_numpy(arrays[name]).to(tensor.device), tensor))
    optimizer.steps = state.optimizer_steps
