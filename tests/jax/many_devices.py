"""One update on meshes of 8 devices: `python -m tests.jax.many_devices RUN_FILE MODEL OUT MESH...`, in one process with
8 forced devices or in two with 4 each.

Writes into OUT/MESH the gradients of a batch in four micro-batches (on one device also in one), the state after an
update, and as facts.json the loss, how many shards each parameter and moment has and how large one is, and what later
updates compile.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from common.config import load_config
from common.config.method import LossConfig
from safework_jax.main import open_trainer
from safework_jax.processes import open_team
from safework_jax.trainer import JaxTrainer
from tests.teams import save_together
from tests.training import packed, random_sequences

# (replica, fsdp, tensor) by name.
MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "replica": (2, 4, 1), "tensor": (1, 4, 2)}
# 29 sequences in 32 rows: the last three are all padding.
BATCH = packed(random_sequences(29, seed=1), 32, 32, packed=False)


def main(run_file: str, model: str, out: str, *meshes: str) -> None:
    """Measure on every mesh."""
    with open_team(60.0) as team:
        assert len(jax.devices()) == 8
        for mesh in meshes:
            folder = Path(out) / mesh
            if team.leads:
                folder.mkdir(parents=True)
            if mesh == "one":
                save_gradients(open_over(run_file, model, mesh, rows=32), folder, "whole")
            trainer = open_over(run_file, model, mesh, rows=8)
            loss = save_gradients(trainer, folder, "split")
            trainer.update(BATCH, 1e-3)
            save_together(trainer, team, folder)
            found = {"loss": loss, "shards": shards(trainer), "compiled": compiled_later(trainer)}
            if team.leads:
                (folder / "facts.json").write_text(json.dumps(found))


def open_over(run_file: str, model: str, mesh: str, rows: int) -> JaxTrainer:
    """A trainer over a mesh, with so many rows in a micro-batch."""
    axes = zip(("replica", "fsdp", "tensor"), MESHES[mesh], strict=True)
    changes = [*(f"backend.jax.mesh.{axis}={size}" for axis, size in axes), f"batch.rows_per_microbatch={rows}"]
    return open_trainer(load_config([run_file], changes), Path(model), None)


def save_gradients(trainer: JaxTrainer, folder: Path, name: str) -> float:
    """The gradients of the batch, as folder/name.safetensors; returns the loss."""
    loss, gradients = trainer.named_gradients(BATCH, LossConfig())
    if jax.process_index() == 0:
        save_file(gradients, folder / f"{name}.safetensors")
    return loss


def compiled_later(trainer: JaxTrainer) -> list[str]:
    """What JAX says of programs that it compiles in two more updates."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    with jax.log_compiles():
        for _ in range(2):
            trainer.update(BATCH, 1e-3)
    logger.removeHandler(handler)
    return [line for line in said if line.startswith("Compiling")]


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
