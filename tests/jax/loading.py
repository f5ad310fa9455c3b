"""What it takes one of several processes with a device each to load its shards: `-m tests.jax.loading MODEL OUT`.

Process 0 writes into OUT the bytes of its shards, of the largest tensor, and of the peak during loading.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from safework_jax.config import MeshSection
from safework_jax.model import load_model
from safework_jax.models.decoder.text import Params
from safework_jax.processes import open_team
from safework_jax.sharding import make_mesh, parameter_sharding
from tests.memory import peak_growth


def main(model: str, out: str) -> None:
    """Load a tiny model, which brings in all code, and then the one to measure."""
    with open_team(60.0) as team:
        load(Path(out).parent / "tiny")
        loaded: list[Params] = []
        peak = peak_growth(lambda: loaded.append(jax.block_until_ready(load(Path(model)))))
        if team.leads:
            own = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded)]
            Path(out).write_text(json.dumps({"shards": sum(own), "largest": max(own), "peak": peak}))


def load(folder: Path) -> Params:
    mesh = make_mesh(MeshSection(fsdp=jax.device_count()))
    return load_model(folder, jnp.float32, partial(parameter_sharding, mesh=mesh))[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
