"""One engine's part of the ladder, each in a process of its own: recording what both are fed, measuring one side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.config import LoadedConfig
from common.disk import not_written
from common.experiment import load_data, open_chat, policy_folder
from common.parity.measure import ParityTrainer, measure, relay
from common.parity.recording import record
from common.rollout.sampler import RolloutSampler
from common.serving.in_process import OpenJudge

OpenTrainer = Callable[[LoadedConfig, Path, Path | None], ParityTrainer]


def record_batches(
    loaded: LoadedConfig, open_trainer: OpenTrainer, open_judge: OpenJudge, folder: Path, num_batches: int
) -> None:
    """Sample batches from the policy into a folder."""
    config = loaded.config
    policy = policy_folder(loaded)
    chat = open_chat(loaded, policy)
    data = load_data(loaded, chat, open_judge)
    sampler = RolloutSampler(open_trainer(loaded, policy, None), chat, config.rollout, config.run.seed)
    with closing(data.recipe), _temporary(folder):
        record(config, data, sampler, folder, num_batches)


def measure_side(
    loaded: LoadedConfig, open_trainer: OpenTrainer, recording: Path, gradients: Path, folder: Path
) -> None:
    """Measure this engine on recorded batches, and on the other's gradients, into a folder."""
    trainer = open_trainer(loaded, policy_folder(loaded), None)
    with _temporary(folder):
        measure(loaded.config, trainer, recording, gradients, folder)


def relay_side(loaded: LoadedConfig, open_trainer: OpenTrainer, recording: Path, other: Path, folder: Path) -> None:
    """Go on in this engine where the other one was after half of the replayed steps."""
    trainer = open_trainer(loaded, policy_folder(loaded), None)
    with _temporary(folder):
        relay(loaded.config, trainer, recording, other, folder)


@contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Parity's files are of no use after it; what else can be said when the disk refuses them is where to put them."""
    try:
        yield
    except OSError as error:
        then = "start the same command again, or set TMPDIR to a folder with more room"
        raise not_written(error.filename or folder, error, then) from error
