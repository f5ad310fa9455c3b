"""The causal kernel against the masked reference: where it is taken, it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from safework_torch.attention import Packing, is_causal, packed_attention, reference_mask
from tests.training import packed, random_sequences

CPU = torch.device("cpu")
HEADS, KEY_HEADS, DIM, TOKENS = 4, 2, 16, 300
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


@pytest.mark.parametrize("case", PACKINGS)
def test_rows_are_called_causal_exactly_where_the_causal_kernel_is_right(case: str) -> None:
    where = rows(case)
    real = torch.from_numpy(where.segment_ids > 0)
    query, key, value = vectors(where)
    ours, reference = (
        packed_attention(nn.Identity(), query, key, value, mask, DIM**-0.5)[0]
        for mask in (None, reference_mask(where, None, CPU))
    )
    is_right = torch.allclose(ours[real], reference[real], atol=1e-5)
    assert is_causal(where) == is_right == (case in CAUSAL)
    assert torch.isfinite(ours).all()


def vectors(where: Packing) -> list[torch.Tensor]:
    """Random query, key and value heads [B H T D]."""
    generator = torch.Generator().manual_seed(0)
    count, length = where.positions.shape
    return [torch.randn((count, heads, length, DIM), generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
