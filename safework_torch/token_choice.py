"""From logits and one uniform number a row to a token and its log-probability, by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

from common.trainer import Sampling

# The CDF is summed in two levels, blocks first: faster than one long cumulative sum, and rounding grows less.
BLOCK = 256


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits: float32 [R V], uniforms: float32 [R] -> token ids int64 [R], logprobs float32 [R].

    The logprob is that of the softmax at the temperature, before top-k and top-p; greedy choice reports it at 1.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if sampling.temperature == 0:
        chosen = logits.argmax(dim=-1)
    else:
        chosen = inverse_cdf(truncated(logprobs.exp(), sampling.top_k, sampling.top_p), uniforms)
    return chosen, logprobs.gather(-1, chosen[:, None])[:, 0]


def truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero outside the top_k largest and outside the smallest set that reaches top_p; not renormalised. [R V]."""
    if top_k == 0 and top_p == 1.0:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token stays while what stands before it has not reached top_p; the first always stays.
    keep = ordered.cumsum(dim=-1) - ordered < top_p
    keep[:, 0] = True
    if top_k > 0:
        keep[:, top_k:] = False
    return torch.zeros_like(probabilities).scatter(-1, index, ordered * keep)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the token in which u times the total falls, in vocabulary order. weights >= 0: [R V] -> int64 [R]."""
    rows, vocabulary = weights.shape
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    sums = blocks.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    target = uniforms * ends[:, -1]
    block = (ends <= target[:, None]).sum(dim=-1).clip(max=_last_positive(sums))
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clip(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(rows, device=weights.device), block]
    place = (inside.cumsum(dim=-1) <= (target - before)[:, None]).sum(dim=-1).clip(max=_last_positive(inside))
    return block * BLOCK + place


def _last_positive(weights: Tensor) -> Tensor:
    """Index of each row's last entry above 0: where rounding pushes past the end, the choice stays possible."""
    return weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(dim=-1)
