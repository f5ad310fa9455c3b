"""The JAX engine's program: `python -m safework_jax.main VERB CONFIG... [key=value...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from common import arrays
from common.config import LoadedConfig
from common.engine_main import Engine, run_verb
from common.plan.report import Plan
from common.plan.target import Target
from safework_jax.config import JaxSection
from safework_jax.judging import JaxJudge
from safework_jax.plan import plan
from safework_jax.processes import open_team
from safework_jax.sharding import make_mesh, own_mesh
from safework_jax.trainer import JaxTrainer


def open_trainer(loaded: LoadedConfig, policy: Path, reference: Path | None) -> JaxTrainer:
    """Register JAX with the mathematics and load the models."""
    _prepare(loaded)
    _register()
    assert isinstance(loaded.engine, JaxSection)
    return JaxTrainer(loaded.config, loaded.engine, policy, reference)


def open_plan(loaded: LoadedConfig, target: Target, parts: tuple[str, ...]) -> Plan:
    """What the config's programs need of a TPU target. Raises ConfigError; see `safework_jax/plan.py`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for chips that are not here cannot be read back
    _prepare(loaded)
    _register()
    return plan(loaded, target, parts)


def _register() -> None:
    arrays.register(arrays.Engine(jax.Array, jnp, jax.lax.stop_gradient, jax.ops.segment_sum))


def open_judge(loaded: LoadedConfig, folder: Path) -> JaxJudge:
    """A model that judges ask, in the dtype of the run, over the same devices as the policy; in a team, where each host
    asks its own questions, on the process's first.
    """
    _prepare(loaded)
    assert isinstance(loaded.engine, JaxSection)
    mesh = make_mesh(loaded.engine.mesh) if jax.process_count() == 1 else own_mesh()
    return JaxJudge(folder, loaded.config.backend.dtype, mesh)


def _prepare(loaded: LoadedConfig) -> None:
    if loaded.config.backend.threads:
        # XLA sizes its CPU thread pool by the processors it may run on, when its first device is opened.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: loaded.config.backend.threads])
    # backend.dtype is what products are computed in; left alone, fp32 would mean TF32 on a GPU and bf16 on a TPU.
    jax.config.update("jax_default_matmul_precision", "highest")


if __name__ == "__main__":
    # Where torch is installed too, transformers would import it for its tokenizer, which takes two seconds.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    sys.exit(run_verb(Engine(open_team, open_trainer, open_judge, open_plan), sys.argv[1:]))
