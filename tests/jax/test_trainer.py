"""The JAX engine's trainer keeps the contract of `tests/trainer_contract.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from common.config import load_config
from safework_jax.main import open_trainer
from safework_jax.trainer import JaxTrainer
from tests import trainer_contract as contract
from tests.tiny import make_model
from tests.training import write_run

KL_LOSS = {"kl_type": "k3_loss", "kl_coef": 0.1}


def make_trainer(model: Path, reference: Path | None = None, /, **sections: dict[str, Any]) -> JaxTrainer:
    sections["backend"] = {"name": "jax", "threads": 0, **sections.get("backend", {})}
    return open_trainer(load_config([write_run(model.parent, model, **sections)]), model, reference)


def test_any_split_gives_the_same_gradient(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3", head_dim=16)
    contract.check_splits(
        lambda rows: make_trainer(model, batch={"rows_per_microbatch": rows}, backend={"recompute": "dots"})
    )


def test_update_reports_what_happened(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trainer = make_trainer(model, model, loss=KL_LOSS)
    contract.check_metrics(trainer, model, load_config([tmp_path / "run.yaml"]).config.loss)


def test_non_finite_updates_change_nothing(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    contract.check_guard(make_trainer(model), make_trainer(model), tmp_path)


def test_restored_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    contract.check_save_and_restore(make_trainer(model), make_trainer(model), tmp_path)


def test_moments_may_rest_on_the_host(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    offloaded, resumed = (make_trainer(model, backend={"offload_optimizer": True}) for _ in range(2))
    contract.check_offloaded(offloaded, resumed, make_trainer(model), tmp_path)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(resumed._moments.mu)} == {"pinned_host"}


def test_frozen_tensors_stay_and_the_others_are_trained_as_ever(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")

    def open_with(patterns: list[str]) -> JaxTrainer:
        return make_trainer(model, model={"frozen": patterns}, optimizer={"learning_rate": 1e-5, "weight_decay": 0.1})

    contract.check_frozen(open_with, tmp_path / "states")


def test_reference_stays_what_it_was(tmp_path: Path) -> None:
    model, reference = make_model(tmp_path / "model"), make_model(tmp_path / "reference", seed=1)
    for offload in (False, True):
        trainer = make_trainer(model, reference, loss=KL_LOSS, backend={"offload_reference": offload})
        assert trainer._reference is not None
        lies = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(trainer._reference[1])}
        assert (lies == {"pinned_host"}) == offload
        contract.check_reference(trainer, make_trainer(reference))


def test_a_policy_and_the_same_reference_answer_alike(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trainer = make_trainer(model, model, loss=KL_LOSS, backend={"dtype": "bfloat16"})
    assert trainer._reference is not None
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trainer._reference[1])} == {"bfloat16"}
    contract.check_same_reference(trainer)


def test_bfloat16_stays_in_the_products(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3", head_dim=16)
    contract.check_bfloat16(make_trainer(model, backend={"dtype": "bfloat16"}), make_trainer(model))
