"""Rollout groups with advantages -> packed train batches, one for each update.

A row holds several sequences, told apart by segment ids; positions restart with each; padding weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.algorithms.weights import importance_weights, sequence_weights
from common.config.method import ImportanceConfig, LossConfig
from common.config.run import BatchSection
from common.types import RolloutGroup, TrainBatch


@dataclass(frozen=True)
class TrainSequence:
    """One prompt with one response, as it is trained on: all arrays [T], the scalars hold for each sampled token."""

    token_ids: np.ndarray
    sampled: np.ndarray
    sampling_logprobs: np.ndarray
    advantage: float
    weight: float


def train_batches(
    groups: Sequence[RolloutGroup],
    advantages: np.ndarray,
    loss: LossConfig,
    section: BatchSection,
    max_new_tokens: int,
    num_before_drops: int,
) -> list[TrainBatch]:
    """The update batches of one step: groups split evenly, in order, over `updates_per_rollout` updates.

    advantages: [P G]. num_before_drops: sequences of the step before uninformative groups were dropped
    (`fixed_length` counts them).
    """
    batches = []
    for members in np.array_split(np.arange(len(groups)), loss.updates_per_rollout):
        if len(members) == 0:
            continue
        chosen = [groups[index] for index in members]
        share = num_before_drops / loss.updates_per_rollout
        sequences = _sequences(chosen, advantages[members], loss.aggregation, share, max_new_tokens)
        batches.append(pack(sequences, section))
    return batches


def _sequences(
    groups: Sequence[RolloutGroup], advantages: np.ndarray, aggregation: str, num_before_drops: float, max_length: int
) -> list[TrainSequence]:
    rollouts = [(group.prompt_token_ids, rollout) for group in groups for rollout in group.rollouts]
    lengths = np.array([rollout.sampled.sum() for _, rollout in rollouts])
    weights = sequence_weights(aggregation, lengths, num_before_drops, max_length)
    return [
        TrainSequence(
            token_ids=np.concatenate([prompt, rollout.token_ids]),
            sampled=np.concatenate([np.zeros(len(prompt), bool), rollout.sampled]),
            sampling_logprobs=np.concatenate([np.zeros(len(prompt), np.float32), rollout.logprobs]),
            advantage=float(advantage),
            weight=float(weight),
        )
        for (prompt, rollout), advantage, weight in zip(rollouts, advantages.reshape(-1), weights, strict=True)
    ]


def pack(sequences: Sequence[TrainSequence], section: BatchSection) -> TrainBatch:
    """First-fit by falling length into rows of `row_tokens`; rows filled up to whole micro-batches with padding.

    With `packed` off, one sequence a row. Ties keep the given order, so the result depends on the input alone.
    """
    rows = _assign_rows(np.array([len(sequence.token_ids) for sequence in sequences]), section)
    num_rows = -(-len(rows) // section.rows_per_microbatch) * section.rows_per_microbatch
    batch = _empty_batch(num_rows, section.row_tokens)
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, start=1):
            start = _place(batch, sequences[member], row, start, segment)
    return batch


def _assign_rows(lengths: np.ndarray, section: BatchSection) -> list[list[int]]:
    assert lengths.max() <= section.row_tokens, "the config check bounds prompt and response"
    if not section.packed:
        return [[index] for index in range(len(lengths))]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in np.argsort(-lengths, kind="stable"):
        row = next((place for place, free in enumerate(room) if free >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(section.row_tokens)
        rows[row].append(int(index))
        room[row] -= int(lengths[index])
    return rows


def _empty_batch(num_rows: int, row_tokens: int) -> TrainBatch:
    def zeros(dtype: type) -> np.ndarray:
        return np.zeros((num_rows, row_tokens), dtype)

    return TrainBatch(
        token_ids=zeros(np.int32),
        positions=np.tile(np.arange(row_tokens, dtype=np.int32), (num_rows, 1)),
        segment_ids=zeros(np.int32),
        sampled=zeros(bool),
        sampling_logprobs=zeros(np.float32),
        advantages=zeros(np.float32),
        policy_weights=zeros(np.float32),
        kl_weights=zeros(np.float32),
    )


def _place(batch: TrainBatch, sequence: TrainSequence, row: int, start: int, segment: int) -> int:
    """Write one sequence into a row that is still being built; returns where the next one starts."""
    end = start + len(sequence.token_ids)
    place = (row, slice(start, end))
    batch.token_ids[place] = sequence.token_ids
    batch.positions[place] = np.arange(end - start)
    batch.positions[row, end:] = np.arange(batch.positions.shape[1] - end)
    batch.segment_ids[place] = segment
    batch.sampled[place] = sequence.sampled
    batch.sampling_logprobs[place] = sequence.sampling_logprobs
    batch.advantages[place] = np.where(sequence.sampled, sequence.advantage, 0.0)
    batch.policy_weights[place] = np.where(sequence.sampled, sequence.weight, 0.0)
    batch.kl_weights[place] = batch.policy_weights[place]
    return end


def with_old_logprobs(batch: TrainBatch, old: np.ndarray, importance: ImportanceConfig) -> TrainBatch:
    """The batch with old logprobs [B T], its policy weights multiplied by the importance correction."""
    factor = importance_weights(importance, old, batch.sampling_logprobs, batch.sampled, batch.segment_ids)
    return replace(batch, old_logprobs=old, policy_weights=(batch.policy_weights * factor).astype(np.float32))
