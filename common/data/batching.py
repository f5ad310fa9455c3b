"""Rollout groups with advantages -> packed train batches, one for each update.

A row holds several sequences, told apart by segment ids; padding weighs nothing. Responses to one prompt may share its
tokens in a row: each sees the prompt and itself.
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
    """One response with its prompt, as it is trained on.

    prompt: int32 [S]. token_ids: int32 [T], sampled: bool [T], sampling_logprobs: float32 [T], of the response;
    advantage and weight hold for each sampled token. group: sequences of one group have the same prompt.
    """

    group: int
    prompt: np.ndarray
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
    rollouts = [(place, rollout) for place, group in enumerate(groups) for rollout in group.rollouts]
    lengths = np.array([rollout.sampled.sum() for _, rollout in rollouts])
    weights = sequence_weights(aggregation, lengths, num_before_drops, max_length)
    return [
        TrainSequence(
            group=place,
            prompt=groups[place].prompt_token_ids,
            token_ids=rollout.token_ids,
            sampled=rollout.sampled,
            sampling_logprobs=rollout.logprobs,
            advantage=float(advantage),
            weight=float(weight),
        )
        for (place, rollout), advantage, weight in zip(rollouts, advantages.reshape(-1), weights, strict=True)
    ]


def pack(sequences: Sequence[TrainSequence], section: BatchSection) -> TrainBatch:
    """Rows of `row_tokens`, filled up to whole micro-batches with padding.

    With `packed` off, one sequence a row, in the given order. Ties keep that order too, so the result depends on the
    input alone.
    """
    rows = _assign_rows(sequences, section)
    rows += [[]] * (-len(rows) % section.rows_per_microbatch)
    batch = _empty_batch(len(rows), section.row_tokens)
    for row, members in enumerate(rows):
        _fill_row(batch, row, [sequences[member] for member in members], section.share_prompts)
    return batch


@dataclass
class _Row:
    """A row being planned: its sequences, the prompts that it holds, and the tokens left."""

    members: list[int]
    groups: set[int]
    room: int

    def cost(self, sequence: TrainSequence, share_prompts: bool) -> int:
        """Tokens that the sequence would take here."""
        held = share_prompts and sequence.group in self.groups
        return len(sequence.token_ids) + (0 if held else len(sequence.prompt))

    def add(self, index: int, sequence: TrainSequence, share_prompts: bool) -> None:
        self.room -= self.cost(sequence, share_prompts)
        self.members.append(index)
        self.groups.add(sequence.group)


def _assign_rows(sequences: Sequence[TrainSequence], section: BatchSection) -> list[list[int]]:
    """First fit by falling length; with shared prompts, group by group, and best where the prompt already is. Rows come
    by falling work of attention, because the devices that share a micro-batch's rows wait for each other.
    """
    if not section.packed:
        return [[index] for index in range(len(sequences))]
    share = section.share_prompts

    def order(index: int) -> tuple[int, int]:
        sequence = sequences[index]
        length = len(sequence.prompt) + len(sequence.token_ids)
        return (sequence.group if share else 0, -length)

    rows: list[_Row] = []
    for index in sorted(range(len(sequences)), key=order):
        sequence = sequences[index]
        fitting = [row for row in rows if row.cost(sequence, share) <= row.room]
        if not fitting:
            rows.append(_Row([], set(), section.row_tokens))
            fitting = rows[-1:]
        # min takes the first of equals: the earliest row.
        row = min(fitting, key=lambda row: row.cost(sequence, share))
        row.add(index, sequence, share)
        assert row.room >= 0, "the config check bounds prompt and response"
    rows.sort(key=lambda row: -_seen([sequences[member] for member in row.members], share))
    return [row.members for row in rows]


def _seen(sequences: Sequence[TrainSequence], share_prompts: bool) -> int:
    """Pairs of a token and one that it sees, in a row of these sequences."""
    total, held = 0, set[int]()
    for sequence in sequences:
        prompt, response = len(sequence.prompt), len(sequence.token_ids)
        total += response * prompt + response * (response + 1) // 2
        if not (share_prompts and sequence.group in held):
            total += prompt * (prompt + 1) // 2
        held.add(sequence.group)
    return total


def _empty_batch(num_rows: int, row_tokens: int) -> TrainBatch:
    def zeros(dtype: type) -> np.ndarray:
        return np.zeros((num_rows, row_tokens), dtype)

    return TrainBatch(
        token_ids=zeros(np.int32),
        positions=zeros(np.int32),
        segment_ids=zeros(np.int32),
        prefix_ids=zeros(np.int32),
        previous=zeros(np.int32),
        sampled=zeros(bool),
        sampling_logprobs=zeros(np.float32),
        advantages=zeros(np.float32),
        policy_weights=zeros(np.float32),
        kl_weights=zeros(np.float32),
    )


def _fill_row(batch: TrainBatch, row: int, sequences: Sequence[TrainSequence], share_prompts: bool) -> None:
    """Write sequences into an empty row of a batch that is still being built."""
    end = segment = 0
    prompts: dict[int, tuple[int, int]] = {}  # group -> segment and last place of the prompt that it shares here
    for sequence in sorted(sequences, key=lambda sequence: sequence.group) if share_prompts else sequences:
        if not share_prompts or sequence.group not in prompts:
            segment += 1
            end = _write_prompt(batch, row, end, segment, sequence.prompt)
            prompts[sequence.group] = (segment, end - 1)
        prefix, last = prompts[sequence.group]
        segment += share_prompts
        end = _write_response(batch, row, end, segment, prefix, last, sequence)
    batch.positions[row, end:] = np.arange(batch.positions.shape[1] - end)
    batch.previous[row, end:] = np.maximum(np.arange(end, batch.positions.shape[1]) - 1, 0)


def _write_prompt(batch: TrainBatch, row: int, start: int, segment: int, token_ids: np.ndarray) -> int:
    end = start + len(token_ids)
    place = (row, slice(start, end))
    batch.token_ids[place] = token_ids
    batch.positions[place] = np.arange(end - start)
    batch.segment_ids[place] = batch.prefix_ids[place] = segment
    batch.previous[place] = np.maximum(np.arange(start, end) - 1, start)
    return end


def _write_response(
    batch: TrainBatch, row: int, start: int, segment: int, prefix: int, last: int, sequence: TrainSequence
) -> int:
    """Write a response at `start` that continues the prompt whose last token is at `last`; returns where it ends."""
    end = start + len(sequence.token_ids)
    place = (row, slice(start, end))
    batch.token_ids[place] = sequence.token_ids
    batch.positions[place] = len(sequence.prompt) + np.arange(end - start)
    batch.segment_ids[place], batch.prefix_ids[place] = segment, prefix
    batch.previous[place] = np.arange(start, end) - 1
    batch.previous[row, start] = last
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
