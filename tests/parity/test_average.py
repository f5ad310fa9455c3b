"""The average of the weights: the written rule on both engines, saved, handed over, and in the policy's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.parity.measure import ParityTrainer
from common.state_files import open_state
from tests.parity.test_state_exchange import open_engine, saved
from tests.tiny import make_model
from tests.training import packed, random_sequences

DECAY, EVERY, UPDATES = 0.7, 2, 10
BATCH = packed(random_sequences(9), 48, 2)


def with_average(name: str, model: Path) -> ParityTrainer:
    return open_engine(name, model, ema={"decay": DECAY, "every": EVERY})


def of_kind(state: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{kind}/"): array for name, array in state.items() if name.startswith(f"{kind}/")}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, np.ndarray]]]:
    """The states of both engines before and after each of ten updates from the same gradients."""
    folder = tmp_path_factory.mktemp("average")
    model = make_model(folder / "model", num_hidden_layers=1)
    rng, found = np.random.default_rng(0), {}
    with open_state(_start(folder, model)) as start:
        shapes = start.shapes
    steps = [{name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()} for _ in range(UPDATES)]
    for engine in ("torch", "jax"):
        trainer = with_average(engine, model)
        found[engine] = [saved(trainer, folder / f"{engine}-0")]
        for number, gradients in enumerate(steps, 1):
            trainer.apply_gradients(gradients, 1e-2)
            found[engine].append(saved(trainer, folder / f"{engine}-{number}"))
    return found


def _start(folder: Path, model: Path) -> Path:
    saved(with_average("torch", model), folder / "start")
    return folder / "start"


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_it_follows_the_rule_to_fp32_rounding(states: dict[str, list[dict[str, np.ndarray]]], engine: str) -> None:
    weights = [of_kind(state, "model") for state in states[engine]]
    for name, start in weights[0].items():
        average = start.astype(np.float64)
        for number, after in enumerate(weights[1:], 1):
            if number % EVERY == 0:
                average += (1 - DECAY) * (after[name] - average)
            found = of_kind(states[engine][number], "ema")[name]
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, average, rtol=1e-6, atol=1e-7, err_msg=f"{name} after {number}")
        assert np.abs(average - weights[-1][name]).max() > 1e-3


def test_both_engines_have_the_same(states: dict[str, list[dict[str, np.ndarray]]]) -> None:
    ours, theirs = (of_kind(states[engine][-1], "ema") for engine in ("torch", "jax"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("writer", "reader"), [("torch", "jax"), ("jax", "torch")])
def test_it_stands_in_the_policys_place_for_a_while_and_moves_to_the_other_engine(
    tmp_path: Path, writer: str, reader: str
) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    home, away = with_average(writer, model), with_average(reader, model)
    first = home.logprobs(BATCH, "policy")
    home.update(BATCH, 1e-2)  # the average is still the start
    before = saved(home, tmp_path / "before")
    moved = home.logprobs(BATCH, "policy")
    with home.averaged():
        np.testing.assert_array_equal(home.logprobs(BATCH, "policy"), first)
    np.testing.assert_array_equal(home.logprobs(BATCH, "policy"), moved)
    assert np.abs(moved - first).max() > 1e-3
    away.restore(tmp_path / "before")
    for state in (saved(home, tmp_path / "after"), saved(away, tmp_path / "away")):
        assert state.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(state[name], array, err_msg=name)


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_switched_on_later_it_begins_with_the_weights_of_then(tmp_path: Path, engine: str) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    without, later = open_engine(engine, model), with_average(engine, model)
    without.update(BATCH, 1e-2)
    state = saved(without, tmp_path / "without")
    assert not of_kind(state, "ema")
    later.restore(tmp_path / "without")
    found = saved(later, tmp_path / "later")
    for name, array in of_kind(state, "model").items():
        np.testing.assert_array_equal(of_kind(found, "ema")[name], array, err_msg=name)
