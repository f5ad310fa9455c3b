"""The numpy trainer that the loop is tested with: its gradient is the slope of the very objective that engines
differentiate, and it saves all of its state.
"""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from common.algorithms.objective import objective
from common.config import RunConfig, load_config
from common.config.method import LossConfig
from tests.common.algorithms.batches import token_arrays
from tests.common.algorithms.probe import gradient
from tests.numpy_trainer import NumpyTrainer, loss_and_slopes
from tests.runs import lowercase_run
from tests.training import packed, random_sequences, save

VOCABULARY = 320
TYPES = get_args(LossConfig.model_fields["type"].annotation)
KL_TYPES = get_args(LossConfig.model_fields["kl_type"].annotation)
LOSSES = [{"type": kind} for kind in TYPES] + [{"kl_type": kind, "kl_coef": 0.3} for kind in KL_TYPES]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config([lowercase_run(tmp_path_factory.mktemp("run"))]).config


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("keys", LOSSES, ids=lambda keys: "-".join(map(str, keys.values())))
def test_slopes_of_the_loss_equal_central_differences(keys: dict[str, str], old: bool) -> None:
    loss = LossConfig.model_validate(keys)
    logprobs, entropy, constants = token_arrays(3, old=old)
    total, _ = loss_and_slopes(loss, logprobs, entropy, constants)
    expected = gradient(lambda moved: objective(loss, moved, entropy, constants)[0], logprobs)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(total.slope, expected, atol=1e-8)


def test_gradient_of_the_table_equals_central_differences(config: RunConfig) -> None:
    trainer, batch = NumpyTrainer(config, VOCABULARY), packed(random_sequences(4))
    batch = replace(batch, old_logprobs=trainer.logprobs(batch, "policy"))
    _, found, _ = trainer.gradient(trainer.table, batch)
    rng, step = np.random.default_rng(2), 1e-6
    for _ in range(5):
        direction = rng.normal(size=found.shape)
        up, down = (trainer.gradient(trainer.table + sign * step * direction, batch)[0] for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx((found * direction).sum(), rel=1e-5, abs=1e-8)


def test_saved_state_goes_on_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    batch = packed(random_sequences(4))
    trainer, restored = NumpyTrainer(config, VOCABULARY), NumpyTrainer(config, VOCABULARY)
    trainer.update(batch, 0.1)
    save(trainer, tmp_path)
    restored.restore(tmp_path)
    assert trainer.update(batch, 0.1) == restored.update(batch, 0.1)
    np.testing.assert_array_equal(trainer.table, restored.table)
