"""Who sees whom in packed rows, as each kernel is told it: every form against the masked reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from safework_torch.attention import (
    BLOCK,
    Packing,
    block_mask,
    is_causal,
    packed_attention,
    reference_mask,
    seen_blocks,
)
from tests.training import packed, random_sequences

CPU = torch.device("cpu")
HEADS, KEY_HEADS, DIM, TOKENS = 4, 2, 16, 300  # two whole blocks and a broken one
WINDOW = 5
PACKINGS: dict[str, dict[str, Any]] = {
    "packed": {"count": 90},
    "prompts shared": {"count": 90, "share_prompts": True},
    "large groups share": {"count": 90, "share_prompts": True, "group_size": 30},
    "one sequence a row": {"count": 3, "packed": False},
    "one response a prompt, shared": {"count": 2, "share_prompts": True, "group_size": 1, "packed": False},
    "no padding at the end": {"count": 90, "cut": 256},
}
CAUSAL = {"one sequence a row", "one response a prompt, shared"}


def packing(count: int, group_size: int = 3, cut: int = TOKENS, **changes: bool) -> Packing:
    """Rows of random sequences; `cut` leaves the first tokens of each row."""
    batch = packed(random_sequences(count, group_size=group_size), TOKENS, **changes)
    return Packing(*(array[:, :cut] for array in (batch.positions, batch.segment_ids, batch.prefix_ids)))


def rows(case: str) -> Packing:
    return packing(**PACKINGS[case])


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("case", PACKINGS)
def test_blocks_hold_all_that_is_seen_and_leave_out_what_is_not(case: str, window: int | None) -> None:
    where = rows(case)
    length = where.positions.shape[1]
    visible = reference_mask(where, window)[:, 0].numpy()
    partly, wholly = seen_blocks(where, window is not None)
    assert not (partly & wholly).any()
    number = partly.shape[1]
    whole = np.zeros((len(visible), number * BLOCK, number * BLOCK), bool)
    whole[:, :length, :length] = visible
    tiles = whole.reshape(len(visible), number, BLOCK, number, BLOCK)
    assert (tiles.any((2, 4)) <= (partly | wholly)).all()
    assert (wholly <= tiles.all((2, 4))).all()
    if window is None:  # nothing that could be left out is computed
        np.testing.assert_array_equal(partly | wholly, tiles.any((2, 4)))
        np.testing.assert_array_equal(wholly, tiles.all((2, 4)))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("case", PACKINGS)
def test_flex_attention_equals_the_reference(case: str, window: int | None) -> None:
    """Forward alone: torch has no backward pass of it on a CPU (`benchmarks/attention.py` compares them on a GPU)."""
    where = rows(case)
    heads = vectors(where)
    ours = flex_attention(*heads, block_mask=block_mask(where, window, CPU), enable_gqa=True)
    theirs = F.scaled_dot_product_attention(*heads, reference_mask(where, window), enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", PACKINGS)
def test_rows_are_called_causal_exactly_where_the_causal_kernel_is_right(case: str) -> None:
    where = rows(case)
    real = torch.from_numpy(where.segment_ids > 0)
    query, key, value = vectors(where)
    ours, reference = (
        packed_attention(nn.Identity(), query, key, value, mask, DIM**-0.5)[0]
        for mask in (None, reference_mask(where, None))
    )
    is_right = torch.allclose(ours[real], reference[real], atol=1e-5)
    assert is_causal(where) == is_right == (case in CAUSAL)
    assert torch.isfinite(ours).all()


def vectors(where: Packing) -> list[torch.Tensor]:
    """Random query, key and value heads [B H T D]."""
    generator = torch.Generator().manual_seed(0)
    count, length = where.positions.shape
    return [torch.randn((count, heads, length, DIM), generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
