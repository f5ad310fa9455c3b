"""The embedded sampler: prompts prefilled once, responses decoded side by side over a static KV cache.

The default on a CPU and wherever no engine serves. Each token comes from its own uniform number by inverse CDF, so it
does not matter which rows decode together or in which order they finish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from common.trainer import Response, Sampling, SamplingPrompt
from safework_torch.model import by_layer_kind, head
from safework_torch.token_choice import choose

# Rows are compacted once this share of them, or fewer, is still running.
COMPACT_BELOW = 0.75


class KeyValueCache:
    """Keys and values of every layer in `slots` fixed places: [R H S D] each, filled from the left up to `used`."""

    def __init__(self, slots: int) -> None:
        self.used = 0
        self._slots = slots
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with its new keys and values [R H T D]; returns all so far."""
        end = self.used + key.shape[2]
        if layer == len(self._layers):
            shape = (*key.shape[:2], self._slots, key.shape[3])
            self._layers.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self._layers[layer]
        keys[:, :, self.used : end] = key
        values[:, :, self.used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order; a row may be taken several times."""
        for layer, (keys, values) in enumerate(self._layers):
            self._layers[layer] = (_taken(keys, rows, self.used), _taken(values, rows, self.used))


def _taken(stored: Tensor, rows: Tensor, used: int) -> Tensor:
    taken = stored.new_empty((len(rows), *stored.shape[1:]))
    torch.index_select(stored[:, :, :used], 0, rows, out=taken[:, :, :used])
    return taken


class _WeightsOnTheLeft(TorchFunctionMode):
    """Linear layers as W @ x: with a few dozen rows a CPU runs it several times faster than x @ W.T."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            out = (weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)
            return out + bias[0] if bias and bias[0] is not None else out
        return func(*args, **(kwargs or {}))


@dataclass
class _Rows:
    """The responses being decoded, [R] each: the request, whether it still runs, its prompt's left padding, the next
    position, and its numbers [R T]. Finished rows stay until the next compaction.
    """

    request: Tensor
    running: Tensor
    padding: Tensor
    positions: Tensor
    uniforms: Tensor

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(
            self.request[rows], self.running[rows], self.padding[rows], self.positions[rows], self.uniforms[rows]
        )


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Sequence[SamplingPrompt], sampling: Sampling, dtype: torch.dtype
) -> list[list[Response]]:
    """G responses for each prompt, `sampling.rows` decoded at a time; see PolicyTrainer.sample."""
    device = model.device
    requests = [(index, row) for index, prompt in enumerate(prompts) for row in range(len(prompt.uniforms))]
    responses: list[list[Response]] = [[] for _ in prompts]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start in range(0, len(requests), sampling.rows):
            chunk = requests[start : start + sampling.rows]
            for (index, _), response in zip(chunk, _decode_chunk(model, prompts, chunk, sampling), strict=True):
                responses[index].append(response)
    return responses


def _decode_chunk(
    model: PreTrainedModel, prompts: Sequence[SamplingPrompt], chunk: list[tuple[int, int]], sampling: Sampling
) -> list[Response]:
    """Decode one set of rows to the end; responses in the order of the chunk."""
    indices = sorted({index for index, _ in chunk})
    token_ids = [torch.from_numpy(prompts[index].token_ids.astype(np.int64)).to(model.device) for index in indices]
    cache, logits = _prefill(model, token_ids, sampling.max_new_tokens)
    source = torch.tensor([indices.index(index) for index, _ in chunk], device=model.device)
    lengths = torch.tensor([len(ids) for ids in token_ids], device=model.device)[source]
    numbers = np.stack([prompts[index].uniforms[row] for index, row in chunk])
    rows = _Rows(
        request=torch.arange(len(chunk), device=model.device),
        running=torch.ones(len(chunk), dtype=torch.bool, device=model.device),
        padding=cache.used - lengths,
        positions=lengths,
        uniforms=torch.from_numpy(numbers).to(model.device),
    )
    cache.select(source)
    tokens = torch.zeros((len(chunk), sampling.max_new_tokens), dtype=torch.int64, device=model.device)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=model.device)
    counts = torch.zeros(len(chunk), dtype=torch.int64, device=model.device)
    for step, (request, chosen, logprob) in enumerate(_tokens(model, cache, logits[source], rows, sampling)):
        tokens[request, step], logprobs[request, step] = chosen, logprob
        counts[request] = step + 1
    return list(_responses(tokens.cpu().numpy(), logprobs.cpu().numpy(), counts.cpu().numpy(), sampling.stop_ids))


def _prefill(model: PreTrainedModel, token_ids: list[Tensor], room: int) -> tuple[KeyValueCache, Tensor]:
    """Run all prompts once, padded on the left: the cache with room for the responses, and logits [P V]."""
    longest = max(len(ids) for ids in token_ids)
    tokens = torch.zeros((len(token_ids), longest), dtype=torch.int64, device=model.device)
    real = torch.zeros(tokens.shape, dtype=torch.bool, device=model.device)
    for row, ids in enumerate(token_ids):
        tokens[row, longest - len(ids) :] = ids
        real[row, longest - len(ids) :] = True
    positions = (real.long().cumsum(1) - 1).clip(min=0)
    place = torch.arange(longest, device=model.device)
    distance = place[:, None] - place[None, :]
    # Padding attends to padding: a fully masked query would be NaN.
    full = (real[:, None, :, None] == real[:, None, None, :]) & (distance >= 0)
    cache = KeyValueCache(longest + room)
    hidden = _forward(model, tokens, positions, by_layer_kind(model.config, full, distance), cache)
    return cache, (hidden[:, -1] @ head(model).to(hidden.dtype).T).float()


def _forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor, masks: Any, cache: KeyValueCache) -> Tensor:
    output = model.model(
        input_ids=tokens, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True
    )
    cache.used += tokens.shape[1]
    return output.last_hidden_state


def _tokens(
    model: PreTrainedModel, cache: KeyValueCache, logits: Tensor, rows: _Rows, sampling: Sampling
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step: the requests still running, their chosen tokens and logprobs."""
    stop_ids = torch.tensor(sampling.stop_ids, device=model.device)
    weights_first = _WeightsOnTheLeft() if model.device.type == "cpu" else nullcontext()
    for step in range(sampling.max_new_tokens):
        chosen, logprob = choose(logits, rows.uniforms[:, step], sampling)
        yield rows.request[rows.running], chosen[rows.running], logprob[rows.running]
        rows.running &= ~torch.isin(chosen, stop_ids)
        running = rows.running.nonzero()[:, 0]
        if len(running) == 0 or step + 1 == sampling.max_new_tokens:
            return
        if len(running) <= COMPACT_BELOW * len(chosen):
            cache.select(running)
            rows, chosen = rows.take(running), chosen[running]
        with weights_first:
            place = torch.arange(cache.used + 1, device=model.device)
            full = (place >= rows.padding[:, None])[:, None, None, :]
            masks = by_layer_kind(model.config, full, cache.used - place)
            hidden = _forward(model, chosen[:, None], rows.positions[:, None], masks, cache)[:, 0]
            logits = F.linear(hidden, head(model).to(hidden.dtype)).float()
        rows.positions += 1


def _responses(
    tokens: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, stop_ids: tuple[int, ...]
) -> Iterator[Response]:
    for row, count in enumerate(counts):
        ids = tokens[row, :count].astype(np.int32)
        yield Response(ids, logprobs[row, :count].copy(), "stop" if int(ids[-1]) in stop_ids else "length")
