"""The kernels of TPU and GPU against the masked reference: splash attention in Pallas interpret mode, forward and
backward; what cuDNN is told of segments; and which attention a platform is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safework_jax.attention import (
    KeyValues,
    Packing,
    _segments,
    masked_attention,
    splash_attention,
    visible_tokens,
)
from safework_jax.layout import ONE_DEVICE

# Lengths of the segments of two rows of 160 tokens, which is no multiple of the kernel's block; the last is padding.
SEGMENTS = ((3, 64, 1, 70, 22), (160,))


def segment_ids(rows: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Rows of segments 1.., the last of several being padding."""
    numbers = [[*range(1, len(lengths)), 0] if len(lengths) > 1 else [1] for lengths in rows]
    return np.stack([np.repeat(ids, lengths) for ids, lengths in zip(numbers, rows, strict=True)]).astype(np.int32)


def packing(ids: np.ndarray) -> Packing:
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    begins = np.maximum.accumulate(np.where(np.diff(ids, axis=1, prepend=-1) != 0, places, 0), axis=1)
    return Packing(jnp.asarray(places - begins), jnp.asarray(ids), jnp.asarray(ids))


def reference(query: jax.Array, keys: jax.Array, values: jax.Array, ids: np.ndarray) -> jax.Array:
    window = jnp.asarray(2**30)
    return masked_attention(query, KeyValues(keys, values), visible_tokens(packing(ids), window))


def kernel(query: jax.Array, keys: jax.Array, values: jax.Array, ids: np.ndarray) -> jax.Array:
    return splash_attention(query, KeyValues(keys, values), jnp.asarray(ids), interpret=True)


def mixed_and_gradients(attention: Callable[..., jax.Array], dtype: Any) -> list[np.ndarray]:
    """Outputs of 4 query heads over 2 key heads, and the gradients of queries, keys and values."""
    rng = np.random.default_rng(0)
    query, out = (jnp.asarray(rng.normal(size=(2, 160, 4, 16)), dtype) for _ in range(2))
    keys, values = (jnp.asarray(rng.normal(size=(2, 2, 160, 16)), dtype) for _ in range(2))
    ids = segment_ids(SEGMENTS)

    def run(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        mixed, pull = jax.vjp(lambda *arrays: attention(*arrays, ids), *arrays)
        return mixed, *pull(out)

    return [np.asarray(array, np.float32) for array in jax.jit(run)(query, keys, values)]


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_splash_attention_is_the_reference_forward_and_backward(dtype: Any, limit: float) -> None:
    with jax.default_matmul_precision("highest"):
        ours, theirs = mixed_and_gradients(kernel, dtype), mixed_and_gradients(reference, dtype)
    for found, expected in zip(ours, theirs, strict=True):
        assert np.isfinite(found).all() and np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def test_what_cudnn_is_told_of_segments() -> None:
    lengths, starts = _segments(jnp.asarray(segment_ids(((3, 2, 1), (6,), (1, 5)))), 4)
    np.testing.assert_array_equal(lengths, [[3, 2, 1, -1], [6, -1, -1, -1], [1, 5, -1, -1]])
    np.testing.assert_array_equal(starts, [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1], [0, 1, -1, -1, -1]])


def test_cudnn_has_room_for_every_segment_of_a_row_and_others_do_not_ask() -> None:
    ids = np.arange(9)[None]
    assert ONE_DEVICE._replace(kernel="cudnn").for_rows(ids).most_segments == 16
    assert ONE_DEVICE._replace(kernel="cudnn").for_rows(ids // 2).most_segments == 8
    sequence_and_padding = np.array([[1, 1, 1], [1, 0, 0]])
    assert ONE_DEVICE._replace(kernel="cudnn").for_rows(sequence_and_padding).most_segments == 1
    assert ONE_DEVICE.for_rows(ids) == ONE_DEVICE
