"""The JAX engine's choice of a token keeps the contract of `tests/token_choice_contract.py`; cuts, ties and edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.trainer import Sampling
from safework_jax.token_choice import choose, inverse_cdf, truncated
from tests import token_choice_contract as contract
from tests.inverse_cdf import VOCABULARIES


def chosen(logits: np.ndarray, uniforms: np.ndarray, rule: Sampling) -> tuple[np.ndarray, np.ndarray]:
    tokens, logprobs = jax.jit(choose, static_argnums=2)(logits, uniforms, rule)
    assert logprobs.dtype == jnp.float32 and tokens.dtype == jnp.int32
    return np.asarray(tokens), np.asarray(logprobs)


def choose_by_weight(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(inverse_cdf)(weights, uniforms))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_inverse_cdf_equals_the_plain_loop(vocabulary: int) -> None:
    contract.check_plain_loop(choose_by_weight, vocabulary)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_impossible_tokens_are_never_chosen(vocabulary: int) -> None:
    contract.check_impossible_tokens(chosen, vocabulary)


@pytest.mark.parametrize("rule", contract.RULES)
def test_choice_follows_the_cut_softmax_and_reports_the_uncut_one(rule: Sampling) -> None:
    contract.check_cut_softmax(chosen, rule)


def test_frequencies_match_the_softmax() -> None:
    contract.check_frequencies(chosen)


def kept(probabilities: list[float], top_k: int, top_p: float) -> np.ndarray:
    """One row after the cut."""
    return np.asarray(jax.jit(truncated, static_argnums=(1, 2))(np.array([probabilities], np.float32), top_k, top_p))[0]


def test_ties_are_cut_in_vocabulary_order() -> None:
    equal = [1 / 512] * 600
    assert kept(equal, 3, 1.0).nonzero()[0].tolist() == [0, 1, 2]
    # Half of 512ths: 256 tokens reach it, and the first of equals come first.
    assert kept(equal, 0, 0.5).nonzero()[0].tolist() == list(range(256))
    assert kept(equal, 0, 1.0).tolist() == equal


def test_one_token_always_stays() -> None:
    probabilities = [0.125, 0.5, 0.375]
    for top_k, top_p in ((1, 1.0), (0, 0.5), (0, 0.0), (1, 0.9)):
        assert kept(probabilities, top_k, top_p).tolist() == [0.0, 0.5, 0.0]
    assert kept(probabilities, 0, 0.6).tolist() == [0.0, 0.5, 0.375]
    assert kept(probabilities, 9, 1.0).tolist() == probabilities


def test_greedy_takes_the_first_largest_and_ignores_the_number() -> None:
    contract.check_greedy(chosen)
