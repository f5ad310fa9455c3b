"""The embedded sampler: prompts prefilled once, responses decoded side by side over a static KV cache.

The default on a CPU and wherever no engine serves. Each token comes from its own uniform number by inverse CDF, so it
does not matter which rows decode together or in which order they finish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from common.trainer import Response, Sampling, SamplingPrompt
from safework_torch.decoding.cache import KeyValueCache, Layout
from safework_torch.decoding.prefill import prefill
from safework_torch.decoding.step import DecodeStep
from safework_torch.model import next_logits
from safework_torch.token_choice import choose

# Rows are compacted once this share of them, or fewer, is still running.
COMPACT_BELOW = 0.75


@dataclass
class _Rows:
    """The responses being decoded, [R] each: the request, whether it still runs, its numbers [R T], and where its
    tokens stand in the cache. Finished rows stay until the next compaction.
    """

    request: Tensor
    running: Tensor
    uniforms: Tensor
    layout: Layout

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(self.request[rows], self.running[rows], self.uniforms[rows], self.layout.take(rows))


@torch.inference_mode()
def sample(
    model: PreTrainedModel, prompts: Sequence[SamplingPrompt], sampling: Sampling, dtype: torch.dtype
) -> list[list[Response]]:
    """G responses for each prompt, `sampling.rows` decoded at a time; see PolicyTrainer.sample."""
    decode = DecodeStep(model, dtype)
    requests = [(index, row) for index, prompt in enumerate(prompts) for row in range(len(prompt.uniforms))]
    responses: list[list[Response]] = [[] for _ in prompts]
    # Sampling would use up the compiler's limit of programs with its many shapes, and training would run uncompiled.
    uncompiled = torch.compiler.set_stance("force_eager")
    with uncompiled:
        for start in range(0, len(requests), sampling.rows):
            chunk = requests[start : start + sampling.rows]
            for (index, _), response in zip(chunk, _decode_chunk(model, decode, prompts, chunk, sampling), strict=True):
                responses[index].append(response)
    return responses


def _decode_chunk(
    model: PreTrainedModel,
    decode: DecodeStep,
    prompts: Sequence[SamplingPrompt],
    chunk: list[tuple[int, int]],
    sampling: Sampling,
) -> list[Response]:
    """Decode one set of rows to the end; responses in the order of the chunk."""
    indices = sorted({index for index, _ in chunk})
    token_ids = [prompts[index].token_ids for index in indices]
    cache, layout, last = prefill(model, token_ids, sampling.max_new_tokens, decode.dtype)
    logits = next_logits(model, last)
    source = torch.tensor([indices.index(index) for index, _ in chunk], device=model.device)
    numbers = np.stack([prompts[index].uniforms[row] for index, row in chunk])
    rows = _Rows(
        request=torch.arange(len(chunk), device=model.device),
        running=torch.ones(len(chunk), dtype=torch.bool, device=model.device),
        uniforms=torch.from_numpy(numbers).to(model.device),
        layout=layout.take(source),
    )
    cache.select(source)
    tokens = torch.zeros((len(chunk), sampling.max_new_tokens), dtype=torch.int64, device=model.device)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=model.device)
    counts = torch.zeros(len(chunk), dtype=torch.int64, device=logits.device)
    for step, (request, chosen, logprob) in enumerate(
        _tokens(model.config, decode, cache, logits[source], rows, sampling)
    ):
        tokens[request, step], logprobs[request, step] = chosen, logprob
        counts[request] = step + 1
    return list(_responses(tokens.cpu().numpy(), logprobs.cpu().numpy(), counts.cpu().numpy(), sampling.stop_ids))


def _tokens(
    config: PreTrainedConfig,
    decode: DecodeStep,
    cache: KeyValueCache,
    logits: Tensor,
    rows: _Rows,
    sampling: Sampling,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step: the requests still running, their chosen tokens and logprobs."""
    stop_ids = torch.tensor(sampling.stop_ids, device=logits.device)
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
        slots = torch.arange(cache.used + 1, device=logits.device)
        masks = rows.layout.masks(config, slots[-1:], slots)
        logits = decode(chosen, rows.layout.positions(slots[-1:])[:, 0], masks, cache)


def _responses(
    tokens: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, stop_ids: tuple[int, ...]
) -> Iterator[Response]:
    for row, count in enumerate(counts):
        ids = tokens[row, :count].astype(np.int32)
        yield Response(ids, logprobs[row, :count].copy(), "stop" if int(ids[-1]) in stop_ids else "length")
