"""The torch engine's choice of a token keeps the contract of `tests/token_choice_contract.py`; cuts, ties and edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.trainer import Sampling
from safework_torch.token_choice import choose, inverse_cdf, truncated
from tests import token_choice_contract as contract
from tests.inverse_cdf import VOCABULARIES


def chosen(logits: np.ndarray, uniforms: np.ndarray, rule: Sampling) -> tuple[np.ndarray, np.ndarray]:
    tokens, logprobs = choose(torch.from_numpy(logits), torch.from_numpy(uniforms), rule)
    assert logprobs.dtype == torch.float32
    return tokens.numpy(), logprobs.numpy()


def choose_by_weight(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return inverse_cdf(torch.from_numpy(weights), torch.from_numpy(uniforms)).numpy()


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


def test_ties_are_cut_in_vocabulary_order() -> None:
    equal = torch.full((1, 600), 1 / 512)
    assert truncated(equal, 3, 1.0)[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    # Half of 512ths: 256 tokens reach it, and the first of equals come first.
    assert truncated(equal, 0, 0.5)[0].nonzero()[:, 0].tolist() == list(range(256))
    assert torch.equal(truncated(equal, 0, 1.0), equal)


def test_one_token_always_stays() -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3]])
    for top_k, top_p in ((1, 1.0), (0, 0.5), (0, 0.0), (1, 0.9)):
        kept = truncated(probabilities, top_k, top_p)
        assert kept.tolist() == [[0.0, pytest.approx(0.6), 0.0]]
    assert truncated(probabilities, 0, 0.7)[0].nonzero()[:, 0].tolist() == [1, 2]
    assert torch.equal(truncated(probabilities, 9, 1.0), probabilities)


def test_greedy_takes_the_first_largest_and_ignores_the_number() -> None:
    contract.check_greedy(chosen)
