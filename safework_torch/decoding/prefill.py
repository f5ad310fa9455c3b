"""Prompts into the cache: each once, and what all of them begin with once for all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from safework_torch.decoding.cache import KeyValueCache, Layout


def prefill(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], room: int, dtype: torch.dtype
) -> tuple[KeyValueCache, Layout, Tensor]:
    """Run prompts, int32 [T] each, through the model.

    Returns the cache with `room` slots left for the response, the layout of its rows, and the hidden state of each
    prompt's last token [P D].
    """
    shared, longest = _shared(prompts), max(map(len, prompts))
    tokens = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt.astype(np.int64))
        tokens[row, :shared], tokens[row, longest - len(ids) + shared :] = ids[:shared], ids[shared:]
    tokens = tokens.to(model.device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=model.device)
    layout, cache = Layout(shared, padding), KeyValueCache(longest + room, dtype)
    if shared:
        _run(model, tokens[:1, :shared], layout.take(padding.new_zeros(1)), cache)
        cache.select(torch.zeros_like(padding))
    return cache, layout, _run(model, tokens[:, shared:], layout, cache)[:, -1]


def _shared(prompts: Sequence[np.ndarray]) -> int:
    """Length of the prefix that all prompts have in common; every prompt keeps a token of its own."""
    shortest = min(map(len, prompts))
    if len(prompts) == 1:
        return 0
    same = np.all([prompt[: shortest - 1] == prompts[0][: shortest - 1] for prompt in prompts], axis=0)
    return int(np.argmin(np.append(same, False)))


def _run(model: PreTrainedModel, tokens: Tensor, layout: Layout, cache: KeyValueCache) -> Tensor:
    """Run tokens [R T] over what the cache holds and add them to it: hidden states [R T D]."""
    slots = torch.arange(cache.used + tokens.shape[1], device=tokens.device)
    queries = slots[cache.used :]
    masks, positions = layout.masks(model.config, queries, slots), layout.positions(queries).clip(min=0)
    # By its place: transformers 5.24 gave the cache another name.
    output = model.model(tokens, masks, positions, cache, use_cache=True)
    cache.used = len(slots)
    return output.last_hidden_state
