"""One update in several processes: `python -m tests.torch.many_processes RUN_FILE MODEL OUT MODE...`, started for each.

Writes into OUT/MODE the gradients of each batch, the state after an update and, as facts.json, how often weights were
gathered and gradients reduced in an update of four micro-batches, and which share of each weight the first process has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.numpy import save_file
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from common.config import load_config
from common.config.method import LossConfig
from common.types import TrainBatch
from safework_torch.main import open_trainer
from safework_torch.processes import open_team
from safework_torch.sharding import local
from safework_torch.trainer import TorchTrainer
from tests.teams import save_together
from tests.training import packed, random_sequences

ROWS = 8  # of a micro-batch
OFFLOADED = ", offloaded"  # behind a mode: its weights rest on the host
BATCHES: dict[str, TrainBatch] = {
    "four micro-batches": packed(random_sequences(32, seed=1), 32, ROWS, packed=False),
    "packed, prompts shared": packed(random_sequences(32, seed=2), 64, ROWS, share_prompts=True),
    "one real row": packed(random_sequences(1, seed=3, group_size=1), 32, ROWS),
}


def main(run_file: str, model: str, out: str, *modes: str) -> None:
    """Measure every mode of sharding, one behind the other."""
    with open_team(60.0) as team:
        for mode in modes:
            sharding = mode.removesuffix(OFFLOADED)
            resting = f"backend.torch.offload_parameters={str(mode != sharding).lower()}"
            overrides = [f"backend.torch.sharding={sharding}", resting, f"batch.rows_per_microbatch={ROWS}"]
            trainer = open_trainer(load_config([run_file], overrides), Path(model), None)
            assert offloads(trainer) in (None, mode != sharding)
            folder = Path(out) / mode
            if team.leads:
                folder.mkdir(parents=True)
            for name, batch in BATCHES.items():
                gradients = trainer.named_gradients(batch, LossConfig())[1]
                if team.leads:
                    save_file(gradients, folder / f"{name}.safetensors")
            facts = {"calls": counted(trainer), "shares": shares(trainer)}
            save_together(trainer, team, folder)
            if team.leads:
                (folder / "facts.json").write_text(json.dumps(facts))


def counted(trainer: TorchTrainer) -> dict[str, int]:
    """How often each collective ran in an update of four micro-batches."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        trainer.update(BATCHES["four micro-batches"], 1e-3)
    return {event.key: event.count for event in watched.key_averages() if event.key.startswith("c10d::")}


def offloads(trainer: TorchTrainer) -> bool | None:
    """Whether weights were told to stay on the host, where on a CPU they are in any case; None in one process."""
    layer = trainer._policy.model.model.layers[0]
    if not isinstance(layer, FSDPModule):
        return None
    return all(weight.offload_to_cpu for weight in layer._get_fsdp_state()._fsdp_param_group.fsdp_params)


def shares(trainer: TorchTrainer) -> dict[str, float]:
    """The part of each weight and of its moment that this process holds."""
    rule = trainer._optimizer
    return {
        f"{kind} {name}": local(tensor.detach()).numel() / rule.named[name].numel()
        for kind, tensors in (("weight", rule.named), ("moment", rule.second_moment))
        for name, tensor in tensors.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
