"""Packing loses nothing, mixes nothing and overflows no row; weights say how much each token counts, once."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.method import ImportanceConfig, LossConfig
from common.config.run import BatchSection
from common.data.batching import TrainSequence, pack, train_batches, with_old_logprobs
from common.types import Prompt, Rollout, RolloutGroup, Span, TrainBatch

ARRAYS = {
    **dict.fromkeys(("token_ids", "positions", "segment_ids", "prefix_ids", "previous"), np.int32),
    **dict.fromkeys(("sampling_logprobs", "advantages", "policy_weights", "kl_weights"), np.float32),
    "sampled": bool,
}


class Shape(NamedTuple):
    """Token counts of a group: its prompt and its responses."""

    prompt: int
    responses: tuple[int, ...]


SHAPES = st.lists(
    st.builds(Shape, st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=6,
)
# (packed, share_prompts): the three ways to fill rows.
MODES = [(True, True), (True, False), (False, False)]


def section(row_tokens: int, rows: int = 1, mode: tuple[bool, bool] = (True, False)) -> BatchSection:
    return BatchSection(row_tokens=row_tokens, rows_per_microbatch=rows, packed=mode[0], share_prompts=mode[1])


def groups_of(shapes: list[Shape], seed: int = 0) -> list[RolloutGroup]:
    """Groups whose tokens are all different, so that each can be found again."""
    rng, first, groups = np.random.default_rng(seed), 1, []
    for draw, shape in enumerate(shapes):
        prompt_ids = np.arange(first, first + shape.prompt, dtype=np.int32)
        first += shape.prompt
        rollouts = []
        for length in shape.responses:
            ids = np.arange(first, first + length, dtype=np.int32)
            first += length
            sampled, logprobs = np.ones(length, bool), -rng.random(length, np.float32)
            rollouts.append(Rollout(ids, sampled, logprobs, "", None, "", None, Span(0, length), "stop", 0))
        groups.append(RolloutGroup(Prompt(str(draw), "l", ()), draw, prompt_ids, tuple(rollouts)))
    return groups


def sequences_of(groups: list[RolloutGroup]) -> list[TrainSequence]:
    """Every response with an advantage and a weight of its own."""
    pairs = [(place, group, rollout) for place, group in enumerate(groups) for rollout in group.rollouts]
    return [
        TrainSequence(
            place, group.prompt_token_ids, rollout.token_ids, rollout.sampled, rollout.logprobs, 1.0 + n, 2.0 + n
        )
        for n, (place, group, rollout) in enumerate(pairs)
    ]


def longest(shapes: list[Shape]) -> int:
    return max(shape.prompt + max(shape.responses) for shape in shapes)


def chain(batch: TrainBatch, row: int, place: int) -> list[int]:
    """Places of a token and of all before it in its sequence, by `previous`, in order."""
    places = [place]
    while (before := int(batch.previous[row, places[-1]])) != places[-1]:
        places.append(before)
    return places[::-1]


def found_sequences(batch: TrainBatch) -> list[tuple[int, list[int]]]:
    """(row, places) of every sequence: each token that no other continues ends one."""
    found = []
    for row in range(len(batch.token_ids)):
        used = batch.segment_ids[row] > 0
        continued = {int(before) for place, before in enumerate(batch.previous[row]) if used[place] and before != place}
        found += [(row, chain(batch, row, place)) for place in np.flatnonzero(used) if int(place) not in continued]
    return found


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, spare=st.integers(0, 25), rows=st.integers(1, 4))
def test_every_sequence_is_there_once_and_sees_itself_alone(
    mode: tuple[bool, bool], shapes: list[Shape], spare: int, rows: int
) -> None:
    groups = groups_of(shapes)
    sequences = sequences_of(groups)
    batch = pack(sequences, section(longest(shapes) + spare, rows, mode))
    assert {name: getattr(batch, name).dtype for name in ARRAYS} == ARRAYS
    assert len(batch.token_ids) % rows == 0
    by_tokens = {tuple(sequence.token_ids): sequence for sequence in sequences}
    for row, places in found_sequences(batch):
        ids = batch.token_ids[row, places]
        sequence = by_tokens.pop(next(key for key in by_tokens if key[-1] == ids[-1]))
        start = len(sequence.prompt)
        assert ids.tolist() == [*sequence.prompt, *sequence.token_ids]
        assert batch.positions[row, places].tolist() == list(range(len(ids)))
        response = places[start:]
        assert not batch.sampled[row, places[:start]].any()
        assert batch.sampled[row, response].all()
        np.testing.assert_array_equal(batch.sampling_logprobs[row, response], sequence.sampling_logprobs)
        assert set(batch.advantages[row, response]) == {sequence.advantage}
        assert set(batch.policy_weights[row, response]) == set(batch.kl_weights[row, response]) == {sequence.weight}
        # What attention lets the last token see: earlier places of its segment and of the prompt that it continues.
        own, prefix = batch.segment_ids[row, places[-1]], batch.prefix_ids[row, places[-1]]
        seen = np.flatnonzero(np.isin(batch.segment_ids[row], [own, prefix])[: places[-1] + 1])
        assert seen.tolist() == places
    assert by_tokens == {}


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, spare=st.integers(0, 25))
def test_no_token_is_there_twice_and_padding_weighs_nothing(
    mode: tuple[bool, bool], shapes: list[Shape], spare: int
) -> None:
    batch = pack(sequences_of(groups_of(shapes)), section(longest(shapes) + spare, 3, mode))
    padding = batch.segment_ids == 0
    responses = sum(sum(shape.responses) for shape in shapes)
    prompts = [shape.prompt * (1 if mode[1] else len(shape.responses)) for shape in shapes]
    if mode[1]:  # a group that does not fit into one row needs its prompt in each
        assert responses + sum(prompts) <= (~padding).sum()
    else:
        assert responses + sum(prompts) == (~padding).sum()
    assert batch.sampled.sum() == responses
    for name in ("token_ids", "policy_weights", "kl_weights", "advantages", "sampling_logprobs", "prefix_ids"):
        assert not getattr(batch, name)[padding].any()
    prompt_part = ~batch.sampled
    assert not batch.policy_weights[prompt_part].any()
    assert not batch.kl_weights[prompt_part].any()
    assert (batch.previous >= 0).all()
    assert (batch.previous <= np.arange(batch.previous.shape[1])).all()


def test_padding_positions_restart() -> None:
    batch = pack(sequences_of(groups_of([Shape(2, (3,))])), section(9, 2))
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 4, 0, 1, 2, 3], list(range(9))])
    np.testing.assert_array_equal(batch.segment_ids, [[1] * 5 + [0] * 4, [0] * 9])


def test_rows_by_example() -> None:
    groups = groups_of([Shape(2, (2, 4)), Shape(1, (1, 1))])
    plain = pack(sequences_of(groups), section(10))
    np.testing.assert_array_equal(plain.segment_ids, [[1, 1, 1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(plain.prefix_ids, plain.segment_ids)
    np.testing.assert_array_equal(plain.positions[0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    shared = pack(sequences_of(groups), section(12, 1, (True, True)))
    np.testing.assert_array_equal(shared.token_ids, [[1, 2, 5, 6, 7, 8, 3, 4, 9, 10, 11, 0]])
    np.testing.assert_array_equal(shared.segment_ids, [[1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 0]])
    np.testing.assert_array_equal(shared.prefix_ids, [[1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 0]])
    np.testing.assert_array_equal(shared.positions, [[0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 1, 0]])
    np.testing.assert_array_equal(shared.previous, [[0, 0, 1, 2, 3, 4, 1, 6, 8, 8, 8, 10]])


@pytest.mark.parametrize("mode", MODES[:2])
@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, spare=st.integers(0, 25))
def test_rows_come_by_falling_work_of_attention(mode: tuple[bool, bool], shapes: list[Shape], spare: int) -> None:
    batch = pack(sequences_of(groups_of(shapes)), section(longest(shapes) + spare, 1, mode))
    segments, prefixes = batch.segment_ids, batch.prefix_ids
    keys = segments[:, None, :]
    sees = ((segments[:, :, None] == keys) | (prefixes[:, :, None] == keys)) & (segments[:, :, None] > 0)
    work = np.tril(sees).sum((1, 2))
    assert (np.diff(work) <= 0).all() and work[-1] > 0


def test_packing_off_puts_one_sequence_into_a_row_in_the_given_order() -> None:
    shapes = [Shape(2, (3, 1)), Shape(1, (4,))]
    batch = pack(sequences_of(groups_of(shapes)), section(8, 2, (False, False)))
    assert batch.token_ids.shape == (4, 8)
    assert (batch.segment_ids > 0).sum(1).tolist() == [5, 3, 5, 0]
    assert batch.segment_ids.max() == 1


def test_equal_lengths_keep_the_given_order() -> None:
    batch = pack(sequences_of(groups_of([Shape(1, (1,))] * 5)), section(4))
    np.testing.assert_array_equal(batch.token_ids, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]])


def test_a_sequence_longer_than_a_row_is_our_own_mistake() -> None:
    for mode in MODES:
        with pytest.raises((AssertionError, ValueError)):
            pack(sequences_of(groups_of([Shape(3, (3,))])), section(5, 1, mode))


def test_a_thousand_sequences_are_packed_quickly() -> None:
    rng = np.random.default_rng(0)
    shapes = [Shape(100, tuple(map(int, rng.integers(50, 900, 8)))) for _ in range(128)]
    sequences = sequences_of(groups_of(shapes))
    for mode in MODES[:2]:
        started = time.perf_counter()
        batch = pack(sequences, section(1024, 1, mode))
        assert time.perf_counter() - started < 3
        assert (batch.segment_ids > 0).mean() > 0.7


# Updates and weights --------------------------------------------------------------------------------------------------


def batches_of(
    shapes: list[Shape], num_before_drops: int = 0, max_new_tokens: int = 9, **loss: Any
) -> list[TrainBatch]:
    """The updates of groups of two; advantages are 10 times the group plus the response."""
    groups = groups_of(shapes)
    advantages = 10.0 * np.arange(len(groups))[:, None] + np.arange(len(shapes[0].responses))
    config = LossConfig(old_logprobs="recompute", **loss)
    before = num_before_drops or advantages.size
    return train_batches(groups, advantages, config, section(64), max_new_tokens, before)


PAIRS = st.lists(
    st.builds(Shape, st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))), min_size=1, max_size=7
)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@settings(max_examples=60, deadline=None)
@given(shapes=PAIRS, updates=st.integers(1, 4))
def test_weights_of_an_update_sum_to_one(aggregation: str, shapes: list[Shape], updates: int) -> None:
    for batch in batches_of(shapes, aggregation=aggregation, updates_per_rollout=updates):
        assert batch.policy_weights.sum(dtype=np.float64) == pytest.approx(1.0, rel=1e-6)
        np.testing.assert_array_equal(batch.policy_weights, batch.kl_weights)
        assert (batch.policy_weights[batch.sampled] > 0).all()


def test_weights_by_example() -> None:
    shapes = [Shape(1, (1, 3)), Shape(2, (2, 2))]

    def by_length(batch: TrainBatch) -> dict[int, float]:
        """The weight of a token, by the number of tokens of its response."""
        return {
            int(batch.sampled[row, places].sum()): float(batch.policy_weights[row, places[-1]])
            for row, places in found_sequences(batch)
        }

    (token,) = batches_of(shapes, aggregation="token_mean")
    (sequence,) = batches_of(shapes, aggregation="sequence_mean")
    (fixed,) = batches_of(shapes, aggregation="fixed_length", num_before_drops=10, max_new_tokens=5)
    assert by_length(token) == pytest.approx({1: 1 / 8, 2: 1 / 8, 3: 1 / 8})
    assert by_length(sequence) == pytest.approx({1: 1 / 4, 2: 1 / 8, 3: 1 / 12})
    assert by_length(fixed) == pytest.approx({1: 1 / 50, 2: 1 / 50, 3: 1 / 50})
    halves = batches_of(
        shapes, aggregation="fixed_length", num_before_drops=10, max_new_tokens=5, updates_per_rollout=2
    )
    assert [by_length(half) for half in halves] == [pytest.approx({1: 1 / 25, 3: 1 / 25}), pytest.approx({2: 1 / 25})]


@settings(max_examples=60, deadline=None)
@given(shapes=PAIRS, updates=st.integers(1, 4))
def test_updates_hold_whole_groups_in_order(shapes: list[Shape], updates: int) -> None:
    batches = batches_of(shapes, updates_per_rollout=updates)
    assert len(batches) == min(updates, len(shapes))
    members = []
    for batch in batches:
        advantages = [float(batch.advantages[row, places[-1]]) for row, places in found_sequences(batch)]
        groups = sorted({int(advantage // 10) for advantage in advantages})
        assert sorted(advantages) == [10.0 * group + response for group in groups for response in (0, 1)]
        members.append(groups)
    assert [group for groups in members for group in groups] == list(range(len(shapes)))
    assert max(map(len, members)) - min(map(len, members)) <= 1


def test_tokens_of_the_environment_count_for_nothing() -> None:
    (group,) = groups_of([Shape(2, (4,))])
    rollout = group.rollouts[0]
    rollout.sampled[1:3] = False
    (batch,) = train_batches([group], np.array([[2.0]]), LossConfig(), section(8), 9, 1)
    np.testing.assert_array_equal(batch.sampled[0], [0, 0, 1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(batch.policy_weights[0], [0, 0, 0.5, 0, 0, 0.5, 0, 0])
    np.testing.assert_array_equal(batch.advantages[0], [0, 0, 2, 0, 0, 2, 0, 0])


# Old logprobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "token_tis", "sequence_tis", "icepop"])
def test_importance_is_multiplied_once_and_touches_the_policy_term_alone(kind: Any) -> None:
    config = ImportanceConfig(type=kind, cap=1.5, low=0.8, high=1.2)
    (batch,) = batches_of([Shape(2, (3, 2)), Shape(1, (4, 1))])
    rng = np.random.default_rng(0)
    old = np.where(batch.sampled, batch.sampling_logprobs + rng.normal(0, 0.4, batch.sampled.shape), 7.0)
    new = with_old_logprobs(batch, old.astype(np.float32), config)
    np.testing.assert_array_equal(new.old_logprobs, old.astype(np.float32))
    for name in ARRAYS.keys() - {"policy_weights"}:
        np.testing.assert_array_equal(getattr(new, name), getattr(batch, name))
    assert new.policy_weights.dtype == np.float32
    expected = np.zeros_like(batch.policy_weights)
    for row, places in found_sequences(batch):
        ratio = np.exp((old - batch.sampling_logprobs)[row, places] * batch.sampled[row, places])
        factor = {
            "none": np.ones_like(ratio),
            "token_tis": np.minimum(ratio, 1.5),
            "sequence_tis": np.full_like(ratio, min(ratio.prod(), 1.5)),
            "icepop": np.where((ratio >= 0.8) & (ratio <= 1.2), ratio, 0.0),
        }[kind]
        expected[row, places] = batch.policy_weights[row, places] * factor
    np.testing.assert_allclose(new.policy_weights, expected, rtol=1e-5)
    if kind != "none":
        assert not np.allclose(new.policy_weights, batch.policy_weights)
