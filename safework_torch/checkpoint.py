"""Training state between torch and the files of `common/state_files.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.state_files import open_state
from common.types import Kind, Piece, TrainingState
from safework_torch.optimizer import AdamW, Average
from safework_torch.sharding import is_first_copy, local, own_part


def snapshot(weights: Mapping[str, Tensor], optimizer: AdamW, average: Average | None) -> TrainingState:
    """A copy of this process's shards of parameters, moments and average; none of a shard that a process before it has
    too.
    """
    kinds = _kinds(weights, optimizer, average)
    return TrainingState({kind: _pieces(tensors, weights) for kind, tensors in kinds.items()}, optimizer.steps)


def _kinds(
    weights: Mapping[str, Tensor], optimizer: AdamW, average: Average | None
) -> dict[Kind, Mapping[str, Tensor]]:
    kinds: dict[Kind, Mapping[str, Tensor]] = {
        "model": weights,
        "first_moment": optimizer.first_moment,
        "second_moment": optimizer.second_moment,
    }
    return kinds if average is None else {**kinds, "ema": average.weights}


def _pieces(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, list[Piece]]:
    """weights: say where a tensor of their name lies, of which moments are the part here alone."""
    pieces = {}
    for name, tensor in tensors.items():
        own, weight = local(tensor.detach()), weights[name]
        start = tuple(part.start for part in own_part(weight))
        writes = own.numel() > 0 and is_first_copy(weight)
        pieces[name] = [Piece(own.to("cpu", copy=True).numpy(), start, tuple(weight.shape))] if writes else []
    return pieces


@torch.no_grad()
def restore_state(weights: Mapping[str, Tensor], optimizer: AdamW, average: Average | None, folder: Path) -> None:
    """Read the parts of a saved state that this process holds. Raises NotSaved where it cannot be read."""
    with open_state(folder) as saved:
        saved.refuse_other_shapes({name: tuple(weight.shape) for name, weight in weights.items()})
        for kind, tensors in _kinds(weights, optimizer, average).items():
            source: Kind = kind if kind in saved.kinds else "model"
            for name, tensor in tensors.items():
                local(tensor).copy_(torch.from_numpy(saved.read(source, name, own_part(weights[name]))))
        optimizer.steps = saved.optimizer_steps
