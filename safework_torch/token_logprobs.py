"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Positions whose logits are made at one time. On a CPU they stay near its caches; a GPU wants large products, and adds
# to the weight's gradient once a chunk: 2,048 x 150k vocabulary x 2 bytes = 0.6 GB.
CHUNK = {"cpu": 512, "cuda": 2048}
CHUNK_KEPT = {"cpu": 512, "cuda": 8192}  # where all logits are kept in any case


class _TokenLogprobs(torch.autograd.Function):
    """Chunked log-softmax of `hidden @ weight.T / temperature` at the targets, with its exact gradient.

    In bfloat16 a logit of 20 is rounded by up to 1/16, which would be most of a logprob's error: those of the targets
    are computed once more, in fp32. The backward pass computes logits again, chunk by chunk, unless they are kept; the
    entropy has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        parts, kept = [], []
        for part, target in _chunks(keep, hidden, targets):
            logits = part @ weight.T
            parts.append(_fused(_statistics, hidden.device.type)(logits, part, weight, target, temperature))
            kept += [logits] if keep else []
            del logits  # before the next ones are made
        logprobs, entropy, normalisers, chosen = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalisers, chosen, *kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy_grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, normalisers, all_chosen, *kept = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for index, parts in enumerate(_chunks(bool(kept), hidden, targets, all_chosen, normalisers, grad, hidden_grad)):
            part, target, chosen, normaliser, upstream, out = parts
            logits = kept[index] if kept else part @ weight.T
            # At the targets in a step of its own: fused into the other, it would cost a second array like the logits.
            at_target = _fused(_slope, hidden.device.type)(logits, chosen, normaliser, upstream, ctx.temperature)
            slope = logits.scatter_(-1, target[:, None], at_target)
            torch.mm(slope, weight, out=out)
            if weight_grad is not None:
                _add_product(weight_grad, slope.T, part)
            del logits, slope
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None, None


def _chunks(keep: bool, *arrays: Tensor) -> Any:
    size = (CHUNK_KEPT if keep else CHUNK)[arrays[0].device.type]
    return zip(*(array.split(size) for array in arrays), strict=True)


def _statistics(
    logits: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[C V], [C D], [V D], [C] -> logprob of the target, entropy, log of the normaliser, and the target's own logit,
    fp32 [C] each.

    In sums that a compiler makes in two passes, of which the second is the last use of what is made on the way.
    """
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, targets[:, None])[:, 0]
    else:
        chosen = (hidden.float() * weight[targets].float()).sum(dim=-1)
        is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
        logits = torch.where(is_target, chosen[:, None], logits.float())
    scaled = logits / temperature
    top = scaled.amax(dim=-1, keepdim=True)
    below = scaled - top
    share = below.exp()
    mass = share.sum(dim=-1)
    mean_below = share.mul_(below).sum(dim=-1) / mass
    normaliser = top[:, 0] + mass.log()
    return chosen / temperature - normaliser, mass.log() - mean_below, normaliser, chosen


def _slope(logits: Tensor, chosen: Tensor, normaliser: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    """The gradient [C V] at the logits, upstream x (one-hot(target) - softmax) / temperature: in their place as if no
    token were the target, and what it is at the targets [C 1], whose own logits are `chosen` [C].
    """
    factor = upstream / temperature
    # In fp32, before anything is rounded: where a target is nearly certain, little is left of it.
    at_target = factor * (1.0 - (chosen / temperature - normaliser).exp())
    softmax = (logits.float() / temperature).sub_(normaliser[:, None]).exp_()
    logits.copy_(softmax.mul_(-factor[:, None]))
    return at_target[:, None].to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to an fp32 total, not rounded to the dtype of the factors where the device can do without."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


@cache
def _fused(kernel: Callable[..., Any], device: str) -> Callable[..., Any]:
    """On a GPU compiled: logits are read two or three times in place of ten."""
    return torch.compile(kernel) if device == "cuda" else kernel


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, before: Tensor, temperature: float, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Logprobs (differentiable) and entropies of tokens, fp32 [N] each.

    hidden: float [B T D]. weight: [V D], in the same dtype. targets: int64 [N], the tokens. before: int64 [N], the
    place of the one before each, counted through all rows. keep: the logits, for the backward pass.
    """
    # Not by indexing: its backward pass sorts.
    return _TokenLogprobs.apply(hidden.flatten(0, 1).index_select(0, before), weight, targets, temperature, keep)
