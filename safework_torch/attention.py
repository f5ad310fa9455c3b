"""Attention of packed rows: who sees whom, and which kernel computes it.

    on a GPU, one sequence in a row     SDPA's causal kernel (cuDNN's first): padding comes last, where nothing sees it
    on a GPU, everything else           flex attention, which passes over blocks of tokens that are not seen
    on a CPU, and while sampling        SDPA with a mask, the reference

Masks are made from explicit segment ids and positions, and never inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig

from safework_torch.sharding import sent

PACKED = "safework_packed"  # the name under which transformers calls `packed_attention`

# Families that may mix full and sliding-window layers, and take one mask for each kind.
_MIXING_FAMILIES = ("qwen2", "qwen3")
_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Under a mask cuDNN's kernel and others have given different gradients on an H100 (torch 2.11).
_MASKED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_flex = torch.compile(flex_attention)  # without a compiler it would compute every score
BLOCK = 128  # tokens of a block of flex attention's mask

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
    return by_layer_kind(config, lambda window: _mask(packing, window, device))


def by_layer_kind(config: PreTrainedConfig, make: Callable[[int | None], Made]) -> Made | dict[str, Made]:
    """What `make` gives for a window of so many tokens, or None without one, in the form that the family takes."""
    if config.model_type not in _MIXING_FAMILIES:
        return make(None)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {kind: make(windows[kind]) for kind in sorted(set(config.layer_types))}


def reference_mask(packing: Packing, window: int | None, device: torch.device) -> Tensor:
    """Who sees whom, bool [B 1 T T], worked out on the device."""
    positions, segments, prefixes = (sent(array, device) for array in packing)
    place = torch.arange(segments.shape[1], device=device)
    keys = segments[:, None, None, :]
    seen = (segments[:, None, :, None] == keys) | (prefixes[:, None, :, None] == keys)
    visible = seen & (place[:, None] >= place)
    if window is not None:
        visible &= positions[:, None, :, None] - positions[:, None, None, :] < window
    return visible


def _mask(packing: Packing, window: int | None, device: torch.device) -> Mask:
    if device.type == "cpu":
        return reference_mask(packing, window, device)
    is_unlimited = window is None or window >= packing.positions.shape[1]
    return None if is_unlimited and is_causal(packing) else block_mask(packing, window, device)


def block_mask(packing: Packing, window: int | None, device: torch.device) -> BlockMask:
    """Who sees whom, for flex attention. Blocks are worked out on the host, so that it need not ask the device."""
    positions, segments, prefixes = (sent(array, device) for array in packing)

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segments[row, key]
        seen = (segments[row, query] == segment) | (prefixes[row, query] == segment)
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen & (query >= key)

    # The kernel finds the lists of a row by the stride of heads, which numpy would leave 0.
    lists = [sent(array, device)[:, None] for blocks in seen_blocks(packing, window) for array in _listed(blocks)]
    length = packing.segment_ids.shape[1]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def seen_blocks(packing: Packing, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Of which blocks the tokens of a block may see some, and of which others all: bool [B N N] each, queries first."""
    rows, length = packing.segment_ids.shape
    blocks = -(-length // BLOCK)
    first = np.arange(blocks) * BLOCK
    row, block = np.arange(rows)[:, None], (np.arange(length) // BLOCK)[None]
    owned = np.zeros((rows, blocks, packing.segment_ids.max() + 1), np.int32)  # tokens of each segment
    np.add.at(owned, (row, block, packing.segment_ids), 1)
    seeing = owned.copy()  # tokens that see each segment
    np.add.at(seeing, (row, block, packing.prefix_ids), packing.prefix_ids != packing.segment_ids)
    sizes = np.minimum(length - first, BLOCK)
    some, every = _meet(seeing > 0, owned > 0), ~_meet(seeing < sizes[:, None], owned > 0)
    if window is not None:
        nearest, farthest = _distances(packing.positions, first)
        some &= nearest < window
        every &= farthest < window
    every &= first[:, None] > first
    return some & (first[:, None] >= first) & ~every, every


def _meet(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether a query's and a key's block have a segment in common: bool [B N S] each -> [B N N]."""
    return queries.astype(np.float32) @ keys.astype(np.float32).swapaxes(1, 2) > 0


def _distances(positions: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of how far keys of a block lie behind queries of a block, in positions: int32 [B N N] each."""
    low, high = (cut.reduceat(positions, first, axis=1) for cut in (np.minimum, np.maximum))
    return low[:, :, None] - high[:, None], high[:, :, None] - low[:, None]


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [B N N] -> how many a block sees, int32 [B N], and which, these first, int32 [B N N]."""
    which = np.argsort(~blocks, axis=-1, stable=True)
    return blocks.sum(-1, dtype=np.int32), which.astype(np.int32)


def is_causal(packing: Packing) -> bool:
    """Whether every token but padding sees all tokens before it, as where a row holds one sequence."""
    first, second = packing.segment_ids <= 1, (packing.segment_ids == 2) & (packing.prefix_ids == 1)
    return bool((first | second).all())


def packed_attention(
    _layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it: query [B H T D], key and value [B KV S D] -> [B T H D].

    Queries and keys come in float32, as they were rotated, and are rounded here to the dtype of the values.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    if attention_mask is None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    elif isinstance(attention_mask, BlockMask):
        mixed = _flex(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    elif query.is_cuda:
        group = query.shape[1] // key.shape[1]
        keys, values = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
        with sdpa_kernel(_MASKED_KERNELS):
            mixed = F.scaled_dot_product_attention(query, keys, values, attention_mask, scale=scaling)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def fast_kernels() -> Iterator[None]:
    """SDPA takes the fastest kernel that can: on an H100 cuDNN's takes half the time of flash attention's."""
    with sdpa_kernel(_KERNELS, set_priority=True):
        yield
