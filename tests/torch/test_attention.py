"""The kernels' masks against the masked reference: the causal kernel is right where it is taken, and flex attention is
told of every block of tokens that is seen. Flex attention itself runs on GPUs alone (benchmarks/README.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask

from safework_torch.attention import BLOCK, Packing, block_mask, is_causal, packed_attention, reference_mask
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


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize("case", PACKINGS)
def test_flex_attention_is_told_of_each_block_that_is_seen(case: str, window: int | None) -> None:
    where = rows(case)
    reference, told = reference_mask(where, window, CPU), block_mask(where, window, CPU)
    count, _, length, _ = reference.shape
    assert torch.equal(create_mask(told.mask_mod, count, 1, length, length, device="cpu"), reference)
    blocks = -(-length // BLOCK)
    each = nn.functional.pad(reference, (0, blocks * BLOCK - length) * 2).view(count, 1, blocks, BLOCK, blocks, BLOCK)
    real = nn.functional.pad(torch.ones_like(reference), (0, blocks * BLOCK - length) * 2).view_as(each)
    parts, wholes = listed(told.kv_num_blocks, told.kv_indices), listed(told.full_kv_num_blocks, told.full_kv_indices)
    assert torch.equal(parts ^ wholes, parts | wholes)
    assert (parts | wholes)[each.any(dim=3).any(dim=-1)].all()
    assert (each | ~real).all(dim=3).all(dim=-1)[wholes].all()
    if window is None:  # with one, bounds of distances may name a block more
        assert torch.equal(parts | wholes, each.any(dim=3).any(dim=-1))
    # The kernel steps from row to row by the strides of heads.
    assert told.kv_num_blocks.stride(1) == blocks and told.kv_indices.stride(1) == blocks**2


def listed(counts: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """The lists of a block mask as bool [B 1 N N]."""
    found = torch.zeros(which.shape, dtype=torch.bool)
    for row, block in torch.cartesian_prod(*map(torch.arange, which.shape[::2])):
        found[row, 0, block, which[row, 0, block, : counts[row, 0, block]].long()] = True
    return found


def test_a_long_sequence_has_blocks_that_are_seen_whole() -> None:
    ones = np.ones((1, TOKENS), np.int32)
    told = block_mask(Packing(np.arange(TOKENS, dtype=np.int32)[None], ones, ones), None, CPU)
    assert listed(told.full_kv_num_blocks, told.full_kv_indices)[0, 0].tolist() == np.tri(3, k=-1, dtype=bool).tolist()
    assert listed(told.kv_num_blocks, told.kv_indices)[0, 0].tolist() == np.eye(3, dtype=bool).tolist()
