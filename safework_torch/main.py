"""The torch engine's program: `python -m safework_torch.main VERB CONFIG... [key=value...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from common import arrays
from common.config import LoadedConfig
from common.engine_main import Engine, run_verb
from common.plan.report import Plan
from common.plan.target import Target
from safework_torch.config import TorchSection
from safework_torch.judging import TorchJudge
from safework_torch.processes import open_team
from safework_torch.trainer import TorchTrainer


def _segment_sum(values: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    return torch.zeros(num_segments, dtype=values.dtype, device=values.device).index_add(0, ids, values)


def open_trainer(loaded: LoadedConfig, policy: Path, reference: Path | None) -> TorchTrainer:
    """Register torch with the mathematics, set its threads, and load the models."""
    _prepare(loaded)
    arrays.register(arrays.Engine(Tensor, torch, Tensor.detach, _segment_sum))
    assert isinstance(loaded.engine, TorchSection)
    return TorchTrainer(loaded.config, loaded.engine, policy, reference)


def open_judge(loaded: LoadedConfig, folder: Path) -> TorchJudge:
    """A model that judges ask, in the dtype of the run."""
    _prepare(loaded)
    return TorchJudge(folder, loaded.config.backend.dtype)


def open_plan(loaded: LoadedConfig, target: Target, parts: tuple[str, ...]) -> Plan:
    """What the config's training needs of GPUs. Raises ConfigError; see `safework_torch/plan.py`."""
    from safework_torch.plan import plan  # with torch's compiler, which other verbs do not wait for

    return plan(loaded, target, parts)


def _prepare(loaded: LoadedConfig) -> None:
    if loaded.config.backend.threads:
        torch.set_num_threads(loaded.config.backend.threads)


if __name__ == "__main__":
    sys.exit(run_verb(Engine(open_team, open_trainer, open_judge, open_plan), sys.argv[1:]))
