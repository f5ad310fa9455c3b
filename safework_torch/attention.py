"""Attention of packed rows: who sees whom, and which kernel computes it.

    on a CPU                            SDPA with a mask, the reference that the others are tested against
    on a GPU, one sequence in a row     SDPA's causal kernel (cuDNN's first): padding comes last, where nothing sees it
    on a GPU, any other row             flex attention, over the blocks in which anything is seen

Masks are made on the host, from explicit segment ids and positions, and never inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig

PACKED = "safework_packed"  # the name under which transformers calls `packed_attention`
BLOCK = 128  # tokens on a side of the blocks that flex attention looks at or leaves out

# Families that may mix full and sliding-window layers, and take one mask for each kind.
_MIXING_FAMILIES = ("qwen2", "qwen3")
_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Mask = Tensor | BlockMask | None
Made = TypeVar("Made")


class Packing(NamedTuple):
    """Where the sequences of packed rows lie, int32 [B T] each, as in a TrainBatch."""

    positions: np.ndarray
    segment_ids: np.ndarray
    prefix_ids: np.ndarray


def packed_masks(config: PreTrainedConfig, packing: Packing, device: torch.device) -> Mask | dict[str, Mask]:
    """What each layer is told of who sees whom, in the form that the family takes; None is plain causal.

    A token sees those before it of its segment and of its prefix. Padding is a segment of its own that attends to
    itself: a fully masked row would be NaN.
    """
    if device.type == "cpu":
        return by_layer_kind(config, lambda window: reference_mask(packing, window).to(device))
    return by_layer_kind(config, lambda window: _kernel_mask(packing, window, device))


def by_layer_kind(config: PreTrainedConfig, make: Callable[[int | None], Made]) -> Made | dict[str, Made]:
    """What `make` gives for a window of so many tokens, or None without one, in the form that the family takes."""
    if config.model_type not in _MIXING_FAMILIES:
        return make(None)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {kind: make(windows[kind]) for kind in sorted(set(config.layer_types))}


def reference_mask(packing: Packing, window: int | None) -> Tensor:
    """Who sees whom, bool [B 1 T T]."""
    positions, segments, prefixes = map(torch.from_numpy, packing)
    place = torch.arange(segments.shape[1])
    keys = segments[:, None, None, :]
    seen = (segments[:, None, :, None] == keys) | (prefixes[:, None, :, None] == keys)
    visible = seen & (place[:, None] >= place)
    if window is not None:
        visible &= positions[:, None, :, None] - positions[:, None, None, :] < window
    return visible


def _kernel_mask(packing: Packing, window: int | None, device: torch.device) -> Mask:
    if window is not None and window >= packing.positions.shape[1]:
        window = None
    if window is None and is_causal(packing):
        return None
    return block_mask(packing, window, device)


def is_causal(packing: Packing) -> bool:
    """Whether every token but padding sees all tokens before it, as where a row holds one sequence."""
    first, second = packing.segment_ids <= 1, (packing.segment_ids == 2) & (packing.prefix_ids == 1)
    return bool((first | second).all())


def block_mask(packing: Packing, window: int | None, device: torch.device) -> BlockMask:
    """Who sees whom, for flex attention: the blocks in which anything is seen, and which of them without looking."""
    positions, segments, prefixes = (sent(array, device) for array in packing)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mine = segments[row, key]
        seen = ((segments[row, query] == mine) | (prefixes[row, query] == mine)) & (query >= key)
        return seen if window is None else seen & (positions[row, query] - positions[row, key] < window)

    partly, wholly = seen_blocks(packing, window is not None)
    tables = (sent(table[:, None], device) for blocks in (partly, wholly) for table in _listed(blocks))
    length = packing.segment_ids.shape[1]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length))


def seen_blocks(packing: Packing, has_window: bool) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of queries and keys [B Q K]: those in which something is seen and something may not be, and those in which
    every query sees every key.
    """
    rows, length = packing.segment_ids.shape
    number = -(-length // BLOCK)
    absent = packing.segment_ids.max() + 1  # the segment of what lies behind the end of a row
    padding = ((0, 0), (0, number * BLOCK - length))
    segments, prefixes = (
        np.pad(array, padding, constant_values=absent).reshape(rows, number, BLOCK) for array in packing[1:]
    )
    names = np.arange(absent + 1)
    holds = np.stack([(segments == name).any(2) for name in names[:-1]], axis=2)
    sees = np.stack([((segments == name) | (prefixes == name)).sum(2) for name in names[:-1]], axis=2)
    block = np.arange(number)
    before = block[:, None] > block
    touched = np.einsum("bqs,bks->bqk", (sees > 0).astype(np.int32), holds.astype(np.int32)) > 0
    blind = np.einsum("bqs,bks->bqk", (sees < BLOCK).astype(np.int32), holds.astype(np.int32)) > 0
    whole_keys = (segments != absent).all(2)[:, None]
    wholly = touched & ~blind & before & whole_keys & (not has_window)
    return touched & (before | np.eye(number, dtype=bool)) & ~wholly, wholly


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks each block of queries has, int32 [B Q], and which, these first, int32 [B Q K]."""
    order = np.argsort(~blocks, axis=2, kind="stable")
    return blocks.sum(2).astype(np.int32), order.astype(np.int32)


def packed_attention(
    _layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it: query [B H T D], key and value [B KV S D] -> [B T H D].

    Queries and keys come in float32, as they were rotated, and are rounded here to the dtype of the values.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, BlockMask):
        mixed = _flex()(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    else:
        causal = attention_mask is None
        mixed = F.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)


@cache
def _flex() -> Any:
    """Compiled always: as it stands it computes all scores of a row at once."""
    return torch.compile(flex_attention)


@contextmanager
def fast_kernels() -> Iterator[None]:
    """SDPA takes the fastest kernel that can: on an H100 cuDNN's takes half the time of flash attention's."""
    with sdpa_kernel(_KERNELS, set_priority=True):
        yield


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of the host on the device. The host does not wait for what the device still does."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
