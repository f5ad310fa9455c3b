"""What both engines are fed: train batches sampled once from the starting policy, kept as arrays on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.algorithms.by_label import group_advantages
from common.config import RunConfig
from common.data.batching import train_batches
from common.experiment import Data
from common.rewards.scorer import Scorer, labels, score_arrays
from common.rollout.sampler import Draw, RolloutSampler
from common.team import alone
from common.types import TrainBatch

# Old and reference logprobs of the off-policy batches: the sampler's own, moved by N(0, NOISE), recorded once.
NOISE = 0.1


def record(config: RunConfig, data: Data, sampler: RolloutSampler, folder: Path, num_batches: int) -> None:
    """Sample `num_batches` steps from the policy as it is and write one packed batch of each."""
    folder.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(data.recipe, config.rewards, alone())
    size = config.rollout.prompts_per_step
    for step in range(num_batches):
        draws = [Draw(place, data.train[place]) for place in range(step * size, (step + 1) * size)]
        rolled = sampler.groups(draws, "train", step, config.rollout.group_size, 0)
        groups = scorer.score(rolled).groups
        totals, scores, present, weights = score_arrays(groups, data.recipe)
        credit = group_advantages(config.advantage, labels(groups), totals, scores, present, weights)
        # Groups without spread would have no gradient at all; a fixed pattern keeps every token in the comparison.
        flat = np.ptp(credit, axis=1) == 0
        credit[flat] = np.where(np.arange(credit.shape[1]) % 2, 1.0, -1.0)
        one_update = config.loss.model_copy(update={"updates_per_rollout": 1})
        groups_only = [scored.group for scored in groups]
        [batch] = train_batches(
            groups_only, credit, one_update, config.batch, config.rollout.max_new_tokens, totals.size
        )
        write_batch(batch, folder, step)


def write_batch(batch: TrainBatch, folder: Path, number: int) -> None:
    """Write one batch where `batches` finds it."""
    arrays = {name: array for name, array in vars(batch).items() if array is not None}
    np.savez(folder / f"batch-{number:03d}.npz", **arrays)


def batches(folder: Path) -> list[TrainBatch]:
    """The recorded batches, on-policy: without old or reference logprobs."""
    return [TrainBatch(**np.load(path)) for path in sorted(folder.glob("batch-*.npz"))]


def off_policy(batch: TrainBatch) -> TrainBatch:
    """The batch with old and reference logprobs [B T] moved away from the sampler's, always by the same noise."""
    rng = np.random.default_rng(20_260_101)

    def moved() -> np.ndarray:
        noise = rng.normal(0.0, NOISE, batch.sampling_logprobs.shape)
        return np.where(batch.sampled, batch.sampling_logprobs + noise, 0.0).astype(np.float32)

    return replace(batch, old_logprobs=moved(), ref_logprobs=moved())
