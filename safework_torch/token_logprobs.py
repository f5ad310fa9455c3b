"""Log-probability and entropy of each token, in fp32, without ever holding the logits of a whole row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Positions whose logits exist at one time: 512 x 150k vocabulary x 4 bytes = 0.3 GB.
CHUNK = 512


class _TokenLogprobs(torch.autograd.Function):
    """Chunked log-softmax of `hidden @ weight.T / temperature` at the targets, with its exact gradient.

    The backward pass computes the logits again, chunk by chunk; the entropy has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalisers = [], [], []
        for part, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = _logits(part, weight, temperature)
            normaliser = torch.logsumexp(logits, dim=-1)
            logprobs.append(logits.gather(-1, target[:, None])[:, 0] - normaliser)
            logprob_all = logits.sub_(normaliser[:, None])
            entropies.append(-(logprob_all.exp() * logprob_all).sum(dim=-1))
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalisers))
        ctx.temperature = temperature
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, weight, targets, normalisers = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight)
        parts = (hidden, targets, normalisers, grad, hidden_grad)
        for part, target, normaliser, upstream, out in zip(*(x.split(CHUNK) for x in parts), strict=True):
            logits = _logits(part, weight, ctx.temperature)
            # d logprob / d logits = one-hot(target) - softmax
            slope = logits.sub_(normaliser[:, None]).exp_().mul_(-upstream[:, None])
            slope.scatter_add_(-1, target[:, None], upstream[:, None])
            slope = slope.mul_(1.0 / ctx.temperature).to(hidden.dtype)
            torch.mm(slope, weight.to(hidden.dtype), out=out)
            weight_grad += slope.T @ part
        return hidden_grad, weight_grad, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    return logits if temperature == 1.0 else logits.mul_(1.0 / temperature)


def token_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, previous: Tensor, wanted: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs [B T] (differentiable) and entropies [B T] of the wanted tokens, fp32, 0 elsewhere.

    hidden: float [B T D]. weight: [V D]. token_ids: int [B T]. previous: int [B T], the place of the token before: the
    value at t is predicted from there. wanted: bool [B T], False wherever a sequence starts.
    """
    rows, places = wanted.nonzero(as_tuple=True)
    values, entropy = _TokenLogprobs.apply(
        hidden[rows, previous[rows, places]], weight, token_ids[rows, places], temperature
    )
    zeros = torch.zeros(wanted.shape, dtype=torch.float32, device=hidden.device)
    return zeros.index_put((rows, places), values), zeros.index_put((rows, places), entropy)
