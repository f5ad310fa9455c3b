"""Chunked logprobs and entropies of the JAX engine against a whole log-softmax in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safework_jax.layout import ONE_DEVICE
from safework_jax.token_logprobs import token_logprobs

DIM, VOCABULARY = 12, 57
CHUNK = ONE_DEVICE.logits
chunked = jax.jit(token_logprobs, static_argnums=5)


def inputs(rows: int, tokens: int) -> tuple[np.ndarray, ...]:
    """Hidden states [B T D], weight [V D], token ids [B T], previous [B T], wanted [B T].

    Every seventh token is predicted from a place far back, as where responses share a prompt.
    """
    rng = np.random.default_rng(rows * 10_000 + tokens)
    hidden = rng.normal(size=(rows, tokens, DIM)).astype(np.float32)
    weight = rng.normal(size=(VOCABULARY, DIM)).astype(np.float32)
    token_ids = rng.integers(0, VOCABULARY, (rows, tokens))
    wanted = rng.random((rows, tokens)) < 0.7
    previous = np.tile(np.arange(-1, tokens - 1), (rows, 1))
    previous[:, ::7] //= 2
    previous[:, 0], wanted[:, 0], wanted[0, 1] = 0, False, True
    return hidden, weight, token_ids, previous, wanted


def plain(hidden: Any, weight: Any, token_ids: Any, previous: Any, wanted: Any, temperature: float) -> tuple[Any, Any]:
    """The formula, in the dtype of its inputs, with all logits at once."""
    before = hidden[jnp.arange(len(hidden))[:, None], previous]
    everything = jax.nn.log_softmax(before @ weight.T / temperature, axis=-1)
    chosen = jnp.take_along_axis(everything, token_ids[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(everything) * everything).sum(axis=-1)
    return jnp.where(wanted, chosen, 0.0), jnp.where(wanted, entropy, 0.0)


def with_gradients(function: Callable[..., Any], upstream: np.ndarray, *arrays: Any, temperature: float) -> list[Any]:
    """Logprobs, entropies, and the gradients of the weighed logprobs in hidden states and weight, on the host."""

    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def weighed(hidden: Any, weight: Any) -> tuple[Any, tuple[Any, Any]]:
        logprobs, entropy = function(hidden, weight, *arrays[2:], temperature)
        return (logprobs * upstream).sum(), (logprobs, entropy)

    (_, values), gradients = jax.jit(weighed)(*arrays[:2])
    return [np.asarray(x) for x in (*values, *gradients)]


def exactly(*arrays: np.ndarray) -> list[np.ndarray]:
    return [x.astype(np.float64) if x.dtype == np.float32 else x for x in arrays]


def exact_values(*arrays: np.ndarray) -> list[np.ndarray]:
    """Logprobs and entropies in float64."""
    with jax.enable_x64(True):
        return [np.asarray(x) for x in plain(*exactly(*arrays), 1.0)]


def assert_close(ours: np.ndarray, exact: np.ndarray) -> None:
    assert ours.dtype == np.float32 and exact.dtype == np.float64
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


# Rows shorter than a chunk, whole and broken last chunks, more rows than a chunk has places.
@pytest.mark.parametrize(
    ("rows", "tokens", "temperature"),
    [
        (1, 2, 1.0),
        (3, 40, 0.7),
        (1, CHUNK - 1, 2.5),
        (1, 2 * CHUNK, 1.0),
        (1, CHUNK + 1, 0.7),
        (3, 2 * (CHUNK // 3) + 5, 1.0),
        (CHUNK + 1, 3, 0.7),
    ],
)
def test_values_and_gradients_equal_the_plain_formula(rows: int, tokens: int, temperature: float) -> None:
    arrays = inputs(rows, tokens)
    upstream = np.random.default_rng(1).normal(size=(rows, tokens)).astype(np.float32)
    found = with_gradients(token_logprobs, upstream, *arrays, temperature=temperature)
    with jax.enable_x64(True):
        expected = with_gradients(plain, upstream, *exactly(*arrays), temperature=temperature)
    for ours, exact in zip(found, expected, strict=True):
        assert_close(ours, exact)
    wanted = arrays[-1]
    logprobs, entropy = found[:2]
    assert (logprobs[wanted] < 0).all() and (entropy[wanted] > 0).all()
    assert not logprobs[~wanted].any() and not entropy[~wanted].any()


def test_large_logits_stay_exact() -> None:
    hidden, *rest = inputs(2, 50)
    logprobs, entropy = chunked(30 * hidden, *rest, 1.0)
    exact = exact_values(30 * hidden, *rest)
    assert exact[0].min() < -100
    np.testing.assert_allclose(logprobs, exact[0], rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(entropy, exact[1], rtol=1e-3, atol=1e-4)


def test_nothing_wanted_is_zero_with_zero_gradient() -> None:
    *arrays, wanted = inputs(2, 9)
    upstream = np.ones(wanted.shape, np.float32)
    found = with_gradients(token_logprobs, upstream, *arrays, np.zeros_like(wanted), temperature=1.0)
    assert not any(x.any() for x in found)


def test_what_no_token_is_predicted_from_may_be_no_number() -> None:
    hidden, weight, token_ids, previous, wanted = inputs(3, 40)
    wanted[-1, -5:] = False
    wanted &= previous != 39
    arrays, upstream = (token_ids, previous, wanted), np.ones(wanted.shape, np.float32)
    expected = with_gradients(token_logprobs, upstream, hidden, weight, *arrays, temperature=1.0)
    hidden[-1, -1] = np.nan
    found = with_gradients(token_logprobs, upstream, hidden, weight, *arrays, temperature=1.0)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, exact)


def test_entropy_carries_no_gradient() -> None:
    hidden, *rest = inputs(2, 9)
    gradient = jax.jit(jax.grad(lambda x: token_logprobs(x, *rest, 1.0)[1].sum()))(hidden)
    assert not gradient.any()


def test_bfloat16_hidden_states_give_fp32_logprobs() -> None:
    hidden, weight, *rest = inputs(2, 60)
    half = jnp.asarray(hidden, jnp.bfloat16)
    logprobs, _ = chunked(half, weight, *rest, 1.0)
    assert logprobs.dtype == jnp.float32
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, weight)]
    exact, _ = exact_values(*rounded, *rest)
    # XLA may round the product to bfloat16: 8 bits of a logit of size 10.
    assert np.abs(logprobs - exact).max() < 0.1


def test_a_targets_logit_is_not_rounded() -> None:
    hidden = jnp.asarray([[[2.0, 2.0**-8], [0.0, 0.0]]], jnp.bfloat16)
    weight = np.zeros((VOCABULARY, 2), np.float32)
    weight[7] = 1.0  # the only logit that is not 0: 2.0039, which bfloat16 has as 2
    arrays = np.array([[0, 7]]), np.array([[0, 0]]), np.array([[False, True]])
    with jax.disable_jit():  # or XLA may leave out the rounding of the product
        ours = with_gradients(token_logprobs, np.ones((1, 2)), hidden, jnp.asarray(weight), *arrays, temperature=1.0)
    exact = exact_values(np.asarray(hidden, np.float64), weight.astype(np.float64), *arrays)
    for found, expected in zip(ours[:2], exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    share = np.exp(exact[0][0, 1])
    np.testing.assert_allclose(ours[2][0, 0].astype(np.float32), 1.0 - share, rtol=2.0**-8)


def test_memory_does_not_grow_by_tokens_times_vocabulary() -> None:
    vocabulary = 1 << 15

    def temporary_mib(tokens: int) -> float:
        def loss(hidden: Any, weight: Any) -> Any:
            places = jnp.arange(tokens)[None]
            return token_logprobs(hidden, weight, places, jnp.maximum(places - 1, 0), places > 0, 0.7)[0].sum()

        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tokens, 8), (vocabulary, 8)))
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes / 2**20

    # 4,000 more tokens x 32,768 x 4 bytes = 500 MiB for one array of all logits.
    assert temporary_mib(4600) - temporary_mib(600) < 60
