"""The JAX engine's embedded sampler keeps the contract of `tests/sampler_contract.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import load_config
from safework_jax.main import open_trainer
from safework_jax.trainer import JaxTrainer
from tests.sampler_contract import (
    GREEDY_CASES,
    RULES,
    SAMPLED_CASES,
    check_greedy,
    check_independence,
    check_sampled,
    check_shape,
    make_folder,
)
from tests.training import write_run


def make_trainer(model: Path, temperature: float = 1.0) -> JaxTrainer:
    file = write_run(model.parent, model, backend={"name": "jax", "threads": 0}, rollout={"temperature": temperature})
    return open_trainer(load_config([file]), model, None)


@pytest.mark.parametrize(("name", "stop_ids"), GREEDY_CASES)
def test_greedy_equals_transformers_generate(name: str, stop_ids: tuple[int, ...], tmp_path: Path) -> None:
    model = make_folder(tmp_path, name)
    check_greedy(make_trainer(model), model, stop_ids)


@pytest.mark.parametrize(("name", "rule"), SAMPLED_CASES)
def test_sampled_tokens_and_logprobs_are_those_of_whole_passes(name: str, rule: str, tmp_path: Path) -> None:
    model = make_folder(tmp_path, name)
    check_sampled(make_trainer(model, RULES[rule].temperature), model, RULES[rule])


def test_shape_of_responses(tmp_path: Path) -> None:
    check_shape(make_trainer(make_folder(tmp_path, "llama")))


@pytest.mark.parametrize("name", ["qwen2-sliding"])
def test_responses_do_not_depend_on_what_decodes_side_by_side(name: str, tmp_path: Path) -> None:
    check_independence(make_trainer(make_folder(tmp_path, name)))
