"""The embedded sampler: prompts prefilled once, responses decoded side by side over a static KV cache.

The default on a CPU and wherever no engine serves. Each token comes from its own uniform number by inverse CDF, so it
does not matter which rows decode together or in which order they finish. Shapes come in few sizes, so that few programs
are compiled: prompts are padded to `PROMPT_STEP` tokens, row counts to halvings of the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.trainer import Response, Sampling, SamplingPrompt
from safework_jax.attention import KeyValues
from safework_jax.layout import Layout
from safework_jax.models.decoder.cache import Cache, decode, expand_layer, prefill, unstack_layers
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.text import Params, next_logits
from safework_jax.sharding import host
from safework_jax.token_choice import choose

PROMPT_STEP = 64
SMALLEST_ROWS = 8


class Decoding(NamedTuple):
    """What the sampler's compiled passes depend on besides arrays and rules; hashable, a static argument of jit."""

    model: DecoderConfig
    dtype: jnp.dtype
    layout: Layout


def sample(
    decoding: Decoding, params: Params, prompts: Sequence[SamplingPrompt], sampling: Sampling
) -> list[list[Response]]:
    """G responses for each prompt, `sampling.rows` decoded at a time; see PolicyTrainer.sample."""
    requests = [(index, row) for index, prompt in enumerate(prompts) for row in range(len(prompt.uniforms))]
    responses: list[list[Response]] = [[] for _ in prompts]
    layers = unstack_layers(params)
    for start in range(0, len(requests), sampling.rows):
        chunk = requests[start : start + sampling.rows]
        decoded = _Chunk(decoding, params, layers, prompts, chunk, sampling).decode()
        for (index, _), response in zip(chunk, decoded, strict=True):
            responses[index].append(response)
    return responses


def last_hidden(decoding: Decoding, params: Params, prompts: Sequence[np.ndarray]) -> jax.Array:
    """The final-normed hidden state of each prompt's last token: [P D], and of some rows of padding behind them."""
    return read_prompts(params, *_padded(list(prompts)), decoding)[0]


class _Chunk:
    """One set of responses being decoded together.

    `request` [R] says which response a row decodes, -1 for a row that only fills up the program's size. Finished rows
    stay until half of them are; then the rest moves to the next smaller size.
    """

    def __init__(
        self,
        decoding: Decoding,
        params: Params,
        layers: Any,
        prompts: Sequence[SamplingPrompt],
        chunk: list[tuple[int, int]],
        sampling: Sampling,
    ) -> None:
        self._decoding, self._params, self._layers, self._sampling = decoding, params, layers, sampling
        indices = sorted({index for index, _ in chunk})
        token_ids, lengths = _padded([prompts[index].token_ids for index in indices])
        last, prompt_cache = read_prompts(params, token_ids, lengths, decoding)
        self._request = _fill(np.arange(len(chunk)), row_count(len(chunk)))
        source = np.array([indices.index(index) for index, _ in chunk])[self._request]
        slots = token_ids.shape[1] + sampling.max_new_tokens
        self._cache: Cache = tuple(
            spread(prompt_cache, layer, source, slots, decoding) for layer in range(decoding.model.num_layers)
        )
        self._positions = lengths[source]
        self._uniforms = np.stack([prompts[index].uniforms[row] for index, row in chunk])
        self._first = last[source]
        self._tokens = np.zeros((len(chunk), sampling.max_new_tokens), np.int32)
        self._logprobs = np.zeros(self._tokens.shape, np.float32)
        self._counts = np.zeros(len(chunk), np.int64)

    def decode(self) -> list[Response]:
        """Run to the end; responses in the order of the chunk."""
        running = self._request >= 0
        chosen, logprob = choose_first(
            self._params, self._first, self._uniforms[self._request, 0], self._decoding, self._sampling
        )
        for step in range(self._sampling.max_new_tokens):
            running = self._record(step, host(chosen), host(logprob), running)
            if not running.any() or step + 1 == self._sampling.max_new_tokens:
                break
            if row_count(int(running.sum())) < len(running):
                chosen, running = self._compact(host(chosen), running)
            chosen, logprob, self._cache = advance(
                self._params,
                self._layers,
                chosen,
                self._positions,
                self._cache,
                self._uniforms[self._request, step + 1],
                decoding=self._decoding,
                sampling=self._sampling,
            )
            self._positions = self._positions + 1
        return list(self._responses())

    def _record(self, step: int, chosen: np.ndarray, logprob: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Keep what running rows chose; returns which of them go on."""
        request = self._request[running]
        self._tokens[request, step] = chosen[running]
        self._logprobs[request, step] = logprob[running]
        self._counts[request] = step + 1
        return running & ~np.isin(chosen, self._sampling.stop_ids)

    def _compact(self, chosen: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = np.flatnonzero(running)
        size = row_count(len(left))
        rows = np.concatenate([left, np.full(size - len(left), left[0])])
        self._request, self._positions = self._request[rows], self._positions[rows]
        self._cache = tuple(take(layer, rows) for layer in self._cache)
        return chosen[rows], np.arange(size) < len(left)

    def _responses(self) -> Iterator[Response]:
        for row, count in enumerate(self._counts):
            ids = self._tokens[row, :count].copy()
            reason = "stop" if int(ids[-1]) in self._sampling.stop_ids else "length"
            yield Response(ids, self._logprobs[row, :count].copy(), reason)


def _padded(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts side by side, padded on the right: int32 [P S] and their lengths [P]. P is a power of two."""
    count = 1 << (len(prompts) - 1).bit_length()
    lengths = np.ones(count, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    token_ids = np.zeros((count, -(-int(lengths.max()) // PROMPT_STEP) * PROMPT_STEP), np.int32)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)] = prompt
    return token_ids, lengths


def row_count(rows: int) -> int:
    """The program size that holds so many rows: a power of two, at least SMALLEST_ROWS."""
    return max(SMALLEST_ROWS, 1 << (rows - 1).bit_length())


def _fill(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.full(size - len(rows), -1)])


# The programs: what `safework_jax/plan.py` compiles too.


@partial(jax.jit, static_argnames="decoding")
def read_prompts(
    params: Params, token_ids: jax.Array, lengths: jax.Array, decoding: Decoding
) -> tuple[jax.Array, KeyValues]:
    """Prompts int [P S] of `lengths` [P] -> hidden states of their last tokens [P D], their keys and values."""
    layout = decoding.layout._replace(most_segments=2)  # a prompt and the padding behind it
    return prefill(decoding.model, params, token_ids, lengths, compute_dtype=decoding.dtype, layout=layout)


@partial(jax.jit, static_argnames=("num_slots", "decoding"))
def spread(
    prompts: KeyValues, layer: jax.Array | int, prompt_index: jax.Array, num_slots: int, decoding: Decoding
) -> KeyValues:
    """Give each row the cache of its prompt in one layer, since devices that share rows gather all prompts for it; see
    `expand_layer`.
    """
    return jax.tree.map(decoding.layout.by_rows_and_heads, expand_layer(prompts, layer, prompt_index, num_slots))


@partial(jax.jit, static_argnames=("decoding", "sampling"))
def choose_first(
    params: Params, hidden: jax.Array, uniforms: jax.Array, decoding: Decoding, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [R D], uniforms [R] -> the tokens chosen and their logprobs [R]."""
    return choose(next_logits(decoding.model, params, hidden), uniforms, sampling)


@partial(jax.jit, static_argnames=("decoding", "sampling"), donate_argnames="cache")
def advance(
    params: Params,
    layers: Any,
    chosen: jax.Array,
    positions: jax.Array,
    cache: Cache,
    uniforms: jax.Array,
    *,
    decoding: Decoding,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Append the chosen token to every row and choose the next one."""
    hidden, cache = decode(decoding.model, params, layers, chosen, positions, cache)
    cache = jax.tree.map(decoding.layout.by_rows_and_heads, cache)
    return *choose_first(params, hidden, uniforms, decoding, sampling), cache


@jax.jit
def take(layer: KeyValues, rows: jax.Array) -> KeyValues:
    """The cache of some rows in one layer."""
    return jax.tree.map(lambda x: x[rows], layer)
