"""The processes of a run as torch sees them: those that torchrun, or whoever sets its variables, has started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.team import ProcessesParted, Team, alone, assemble, told_place

Own = TypeVar("Own")


def open_team(deadline_s: float) -> Team:
    """Join the processes that the environment speaks of; alone where it speaks of none. Collectives wait `deadline_s`.

    Raises ProcessesParted when they do not find each other.
    """
    place = told_place()
    if place is None:
        _refuse_untold_tasks()
    if place is None or place.count == 1:
        return alone()
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_index)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=deadline_s))
    except dist.DistError as error:
        raise ProcessesParted(
            f"{place}: did not find process 0 on {os.environ['MASTER_ADDR']} ({str(error).splitlines()[0]})."
        ) from error
    return assemble(place, _spread, deadline_s)


def _refuse_untold_tasks() -> None:
    """Several tasks of srun that know nothing of each other would each train the same run."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise ProcessesParted(
            f"srun started {tasks} tasks, and none is told its RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT. Let safework launch --on slurm write the job, or start one task, or torchrun in each."
        )


def _spread(data: bytes) -> bytes:
    values: list[Any] = [data]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class Rows(NamedTuple):
    """Which rows of every micro-batch are this process's: share `number` of so many `shares`."""

    number: int
    shares: int


def own_rows() -> Rows:
    """Rows are shared by all processes, however the weights are."""
    return Rows(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Rows(0, 1)


def gather_objects(own: Own) -> list[Own]:
    """What every process gives, in their order."""
    if not dist.is_initialized():
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def gather_rows(own: Tensor) -> Tensor:
    """The rows [B ...] of every process, one behind the other; shapes must be equal."""
    if not dist.is_initialized():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)
