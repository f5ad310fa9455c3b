"""The torch engine's choice of a token: inverse CDF against a plain loop, cuts, ties, edges and frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.trainer import Sampling
from safework_torch.token_choice import choose, inverse_cdf, truncated
from tests import inverse_cdf as plain
from tests.training import sampling_rule

RULES = [
    sampling_rule(),
    sampling_rule(temperature=0.7),
    sampling_rule(temperature=1.6, top_k=5),
    sampling_rule(top_p=0.8),
    sampling_rule(top_k=12, top_p=0.9),
    sampling_rule(top_p=1e-6),
]


def chosen(logits: np.ndarray, uniforms: np.ndarray, rule: Sampling) -> tuple[np.ndarray, np.ndarray]:
    tokens, logprobs = choose(torch.from_numpy(logits), torch.from_numpy(uniforms), rule)
    assert logprobs.dtype == torch.float32
    return tokens.numpy(), logprobs.numpy()


def random_logits(rows: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(vocabulary).normal(0.0, 3.0, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", plain.VOCABULARIES)
def test_inverse_cdf_equals_the_plain_loop(vocabulary: int) -> None:
    weights, uniforms = plain.exact_cases(200, vocabulary)
    tokens = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(uniforms)).numpy()
    assert tokens.tolist() == [plain.plain_choice(*pair) for pair in zip(weights, uniforms, strict=True)]
    assert (weights[np.arange(200), tokens] > 0).all()


@pytest.mark.parametrize("vocabulary", plain.VOCABULARIES)
def test_impossible_tokens_are_never_chosen(vocabulary: int) -> None:
    logits = random_logits(plain.VOCABULARIES[-1], vocabulary)
    logits[np.random.default_rng(0).random(logits.shape) < 0.5] = -np.inf
    logits[:, 0] = logits[:, -1] = -np.inf
    logits[:, vocabulary // 2] = 0.0
    for uniforms in (np.zeros(len(logits), np.float32), np.full(len(logits), plain.LARGEST_UNIFORM)):
        tokens, logprobs = chosen(logits, uniforms, sampling_rule())
        assert np.isfinite(logits[np.arange(len(logits)), tokens]).all()
        assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("rule", RULES)
def test_choice_follows_the_cut_softmax_and_reports_the_uncut_one(rule: Sampling) -> None:
    logits = random_logits(400, 300)
    uniforms = np.random.default_rng(1).random(400, np.float32)
    tokens, logprobs = chosen(logits, uniforms, rule)
    probabilities = plain.softmax(logits, rule.temperature)
    np.testing.assert_allclose(logprobs, np.log(probabilities[np.arange(400), tokens]), atol=1e-5)
    for row, token in enumerate(tokens):
        kept = plain.truncated(probabilities[row], rule.top_k, rule.top_p)
        assert kept[token] > 0
        assert plain.distance_from(kept, token, float(uniforms[row])) < 1e-6


def test_frequencies_match_the_softmax() -> None:
    count = 20_000
    logits = random_logits(1, 300)
    tokens, _ = chosen(logits.repeat(count, axis=0), plain.even_uniforms(count), sampling_rule(temperature=0.8))
    expected = count * plain.softmax(logits, 0.8)[0]
    assert np.abs(np.bincount(tokens, minlength=300) - expected).max() < 2


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
    logits = random_logits(50, 700)
    logits[:, 300] = logits[:, 650] = logits.max() + 1
    rule = sampling_rule(temperature=0.0, top_k=3, top_p=0.5)
    tokens, logprobs = chosen(logits, np.random.default_rng(0).random(50, np.float32), rule)
    assert (tokens == 300).all()
    np.testing.assert_allclose(logprobs, np.log(plain.softmax(logits)[:, 300]), atol=1e-5)
