"""One update on 1, 4 and 8 devices: `python -m tests.jax.many_devices RUN_FILE MODEL OUT`, with 8 devices forced.

Writes into OUT, for each number of devices: the gradients of a batch in four micro-batches (on one device also in one),
the state after an update, and, as facts.json, how many shards each parameter and moment has and how large one is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from common.config import load_config
from common.config.method import LossConfig
from safework_jax.main import open_trainer
from safework_jax.trainer import JaxTrainer
from tests.training import packed, random_sequences

DEVICES = (1, 4, 8)
BATCH = packed(random_sequences(32, seed=1), 32, 32, packed=False)


def main(run_file: str, model: str, out: str) -> None:
    """Measure for every number of devices."""
    assert len(jax.devices()) == max(DEVICES)
    facts = {}
    save_gradients(open_over(run_file, model, devices=1, rows=32), Path(out), "whole")
    for devices in DEVICES:
        trainer = open_over(run_file, model, devices, rows=8)
        folder = Path(out) / str(devices)
        folder.mkdir()
        save_gradients(trainer, folder, "split")
        trainer.update(BATCH, 1e-3)
        trainer.save(folder)
        facts[devices] = shards(trainer)
    (Path(out) / "facts.json").write_text(json.dumps(facts))


def open_over(run_file: str, model: str, devices: int, rows: int) -> JaxTrainer:
    """A trainer over some of the devices, with so many rows in a micro-batch."""
    changes = [f"backend.jax.fsdp={devices}", f"batch.rows_per_microbatch={rows}"]
    return open_trainer(load_config([run_file], changes), Path(model), None)


def save_gradients(trainer: JaxTrainer, folder: Path, name: str) -> None:
    """The gradients of the batch, as folder/name.safetensors."""
    save_file(trainer.named_gradients(BATCH, LossConfig())[1], folder / f"{name}.safetensors")


def shards(trainer: JaxTrainer) -> dict[str, tuple[int, int]]:
    """By name: number of different shards, and elements of one, of each parameter and first moment."""
    trees: dict[str, Any] = {"parameter": trainer._params, "moment": trainer._moments.mu}
    return {
        f"{kind}.{name}": (
            len({str(shard.index) for shard in leaf.addressable_shards}),
            leaf.addressable_shards[0].data.size,
        )
        for kind, tree in trees.items()
        for name, leaf in flatten_dict(tree, sep=".").items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
