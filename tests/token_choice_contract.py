"""What every engine's choice of a token owes, as checks of its functions on numpy arrays: the plain loop's choice, the
cut softmax's frequencies and the uncut one's logprobs, and nothing impossible.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.trainer import Sampling
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

# (weights [R V], uniforms [R]) -> tokens [R]
InverseCdf = Callable[[np.ndarray, np.ndarray], np.ndarray]
# (logits [R V], uniforms [R], rule) -> tokens and logprobs [R]
Choose = Callable[[np.ndarray, np.ndarray, Sampling], tuple[np.ndarray, np.ndarray]]


def random_logits(rows: int, vocabulary: int) -> np.ndarray:
    """Logits of deviation 3, float32 [R V], the same for one vocabulary size."""
    return np.random.default_rng(vocabulary).normal(0.0, 3.0, (rows, vocabulary)).astype(np.float32)


def check_plain_loop(inverse_cdf: InverseCdf, vocabulary: int) -> None:
    """The choice is the plain loop's wherever fp32 leaves no doubt."""
    weights, uniforms = plain.exact_cases(200, vocabulary)
    tokens = inverse_cdf(weights, uniforms)
    assert tokens.tolist() == [plain.plain_choice(*pair) for pair in zip(weights, uniforms, strict=True)]
    assert (weights[np.arange(200), tokens] > 0).all()


def check_impossible_tokens(choose: Choose, vocabulary: int) -> None:
    """Tokens of probability 0 are never chosen, at the smallest and the largest number."""
    logits = random_logits(plain.VOCABULARIES[-1], vocabulary)
    logits[np.random.default_rng(0).random(logits.shape) < 0.5] = -np.inf
    logits[:, 0] = logits[:, -1] = -np.inf
    logits[:, vocabulary // 2] = 0.0
    for uniforms in (np.zeros(len(logits), np.float32), np.full(len(logits), plain.LARGEST_UNIFORM)):
        tokens, logprobs = choose(logits, uniforms, sampling_rule())
        assert np.isfinite(logits[np.arange(len(logits)), tokens]).all()
        assert np.isfinite(logprobs).all()


def check_cut_softmax(choose: Choose, rule: Sampling) -> None:
    """The choice follows the softmax after the cut; its logprob is that before."""
    logits = random_logits(400, 300)
    uniforms = np.random.default_rng(1).random(400, np.float32)
    tokens, logprobs = choose(logits, uniforms, rule)
    probabilities = plain.softmax(logits, rule.temperature)
    np.testing.assert_allclose(logprobs, np.log(probabilities[np.arange(400), tokens]), atol=1e-5)
    for row, token in enumerate(tokens):
        kept = plain.truncated(probabilities[row], rule.top_k, rule.top_p)
        assert kept[token] > 0
        assert plain.distance_from(kept, token, float(uniforms[row])) < 1e-6


def check_frequencies(choose: Choose) -> None:
    """Evenly spread numbers choose each token as often as its probability says."""
    count = 20_000
    logits = random_logits(1, 300)
    tokens, _ = choose(logits.repeat(count, axis=0), plain.even_uniforms(count), sampling_rule(temperature=0.8))
    expected = count * plain.softmax(logits, 0.8)[0]
    assert np.abs(np.bincount(tokens, minlength=300) - expected).max() < 2


def check_greedy(choose: Choose) -> None:
    """At temperature 0 the first of the largest is taken, whatever the number and the cut."""
    logits = random_logits(50, 700)
    logits[:, 300] = logits[:, 650] = logits.max() + 1
    rule = sampling_rule(temperature=0.0, top_k=3, top_p=0.5)
    tokens, logprobs = choose(logits, np.random.default_rng(0).random(50, np.float32), rule)
    assert (tokens == 300).all()
    np.testing.assert_allclose(logprobs, np.log(plain.softmax(logits)[:, 300]), atol=1e-5)
