"""A training state written by one engine is read by the other bit for bit, and goes on there as it would at home."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import load_config
from common.disk import NotSaved
from common.parity.ladder import CURVE, LIVE_GRADIENTS, NORM_RATIO
from common.parity.measure import ParityTrainer
from common.parity.recording import off_policy
from common.state_files import MANIFEST
from safework_jax.main import open_trainer as open_jax
from safework_torch.main import open_trainer as open_torch
from tests.tiny import make_model
from tests.training import packed, random_sequences, save, saved_state, write_run

RATE = 1e-3
REPLAY_RATE = 1e-5  # of the ladder
MOMENTS = 1e-3  # after live gradients, as a gradient of the ladder may differ
REPLAYED = [off_policy(packed(random_sequences(9, seed=seed), 48, 2)) for seed in range(20)]
BATCHES = [packed(random_sequences(9, seed=seed), 48, 2) for seed in range(4)]


def open_engine(name: str, model: Path, **sections: dict[str, Any]) -> ParityTrainer:
    loaded = load_config([write_run(model.parent, model, backend={"name": name, "threads": 0}, **sections)])
    opener: Callable[..., ParityTrainer] = {"torch": open_torch, "jax": open_jax}[name]
    return opener(loaded, model, None)


def saved(trainer: ParityTrainer, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    save(trainer, folder)
    return saved_state(folder)


@pytest.mark.parametrize(("writer", "reader"), [("torch", "jax"), ("jax", "torch")])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_other_engine_goes_on(writer: str, reader: str, model_type: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", model_type, tie_word_embeddings=model_type == "qwen2")
    home, away = open_engine(writer, model), open_engine(reader, model)
    for batch in BATCHES[:2]:
        home.update(batch, RATE)
    start = saved(home, tmp_path / "start")
    away.restore(tmp_path / "start")
    for name, array in saved(away, tmp_path / "handed-over").items():
        np.testing.assert_array_equal(array, start[name], err_msg=name)
    for batch in BATCHES[2:]:
        ours, theirs = home.update(batch, RATE), away.update(batch, RATE)
        assert theirs["loss/policy"] == pytest.approx(ours["loss/policy"], abs=CURVE)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=NORM_RATIO)
    expected, found = saved(home, tmp_path / "home"), saved(away, tmp_path / "away")
    for name, array in expected.items():
        moved = array - start[name]
        limit = LIVE_GRADIENTS if name.startswith("model/") else 1e-4
        assert np.linalg.norm(moved) > 0
        assert np.linalg.norm(found[name] - array) <= limit * np.linalg.norm(moved), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty replayed steps on each engine: `ENGINE-start`, `ENGINE-half` and `ENGINE-whole`."""
    folder = tmp_path_factory.mktemp("straight")
    model = make_model(folder / "model")
    for engine in ("torch", "jax"):
        trainer = open_engine(engine, model)
        saved(trainer, folder / f"{engine}-start")
        for name, batches in (("half", REPLAYED[:10]), ("whole", REPLAYED[10:])):
            losses = [trainer.update(batch, REPLAY_RATE)["loss/policy"] for batch in batches]
            saved(trainer, folder / f"{engine}-{name}")
            (folder / f"{engine}-{name}.json").write_text(json.dumps(losses))
    return folder


@pytest.mark.parametrize(("writer", "reader"), [("torch", "jax"), ("jax", "torch")])
def test_ten_steps_here_and_ten_there_are_twenty_of_either(
    straight: Path, tmp_path: Path, writer: str, reader: str
) -> None:
    trainer = open_engine(reader, straight / "model")
    trainer.restore(straight / f"{writer}-half")
    losses = [trainer.update(batch, REPLAY_RATE)["loss/policy"] for batch in REPLAYED[10:]]
    found = saved(trainer, tmp_path / "found")
    for engine in ("torch", "jax"):
        assert losses == pytest.approx(json.loads((straight / f"{engine}-whole.json").read_text()), abs=CURVE)
        start, whole = (saved_state(straight / f"{engine}-{name}") for name in ("start", "whole"))
        assert found.keys() == whole.keys()
        for name, array in whole.items():
            moved = np.linalg.norm(array - start[name])
            limit = LIVE_GRADIENTS if name.startswith("model/") else MOMENTS
            assert moved > 0
            assert np.linalg.norm(found[name] - array) <= limit * moved, name


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_a_state_of_another_model_is_refused(engine: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    larger = make_model(tmp_path / "other" / "model", intermediate_size=128)
    saved(open_engine(engine, larger), tmp_path / "state")
    smaller = open_engine(engine, make_model(tmp_path / "model"))
    with pytest.raises(NotSaved, match=r"is of another model than model.path: model\.layers\.0\.mlp\.down_proj"):
        smaller.restore(tmp_path / "state")


def test_both_write_the_same_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3", head_dim=16)
    states = {name: saved(open_engine(name, model), tmp_path / name) for name in ("torch", "jax")}
    assert states["torch"].keys() == states["jax"].keys()
    for name, array in states["torch"].items():
        np.testing.assert_array_equal(states["jax"][name], array, err_msg=name)
    files = sorted(path.name for path in (tmp_path / "torch").iterdir())
    assert files == ["first_moment.safetensors", MANIFEST, "model.safetensors", "second_moment.safetensors"]
    for file in files:
        assert (tmp_path / "torch" / file).stat().st_size == (tmp_path / "jax" / file).stat().st_size
