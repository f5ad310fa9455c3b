"""A token by inverse CDF the plain way, one loop over the vocabulary in float64: what both engines are held to."""

from __future__ import annotations

import numpy as np

# Vocabulary sizes below, at, just above and far from multiples of the engines' block of 256.
VOCABULARIES = (3, 255, 256, 257, 1000)
LARGEST_UNIFORM = np.float32(1 - 2**-24)


def plain_choice(weights: np.ndarray, uniform: float) -> int:
    """The first token whose running sum passes uniform times the total; the last possible one if none does."""
    target, running = float(uniform) * float(weights.astype(np.float64).sum()), 0.0
    for token, weight in enumerate(weights):
        running += float(weight)
        if running > target:
            return token
    return int(np.flatnonzero(weights)[-1])


def exact_cases(rows: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [R V] and uniforms [R] whose sums and products fp32 holds exactly, so that every choice is certain.

    About half of the weights are 0, long stretches among them. The first rows are the edges: a number of 0 before
    impossible tokens, the largest number below 1 and 1 itself before impossible ones at the end, and a number on the
    boundary between the tokens up to 255 and those after.
    """
    rng = np.random.default_rng(vocabulary)
    weights = rng.integers(0, 8, (rows, vocabulary)) * (rng.random((rows, vocabulary)) < 0.6)
    uniforms = rng.integers(0, 256, rows) / 256
    for row in range(rows):
        start = rng.integers(0, vocabulary)
        weights[row, start : start + 300] = 0
        weights[row, rng.integers(0, vocabulary)] = 5
    half = min(256, vocabulary // 2)
    weights[:4, half] = 5
    weights[0, :half] = weights[1:3, half + 1 :] = weights[3] = 0
    weights[3, half - 1] = weights[3, half] = 3
    uniforms[:4] = 0.0, LARGEST_UNIFORM, 1.0, 0.5
    return weights.astype(np.float32), uniforms.astype(np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [R V]."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def truncated(probabilities: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """One row [V] cut by the rule: at most top_k tokens (0: all), up to and with the one that reaches top_p."""
    kept, reached = np.zeros_like(probabilities), 0.0
    for count, token in enumerate(np.argsort(-probabilities, kind="stable")):
        if (top_k and count >= top_k) or (count > 0 and reached >= top_p):
            break
        kept[token] = probabilities[token]
        reached += float(probabilities[token])
    return kept


def distance_from(weights: np.ndarray, token: int, uniform: float) -> float:
    """How far `uniform` lies outside the token's piece of the CDF of one row [V]; 0 inside."""
    total = weights.sum()
    end = float(weights[: token + 1].sum() / total)
    start = end - float(weights[token] / total)
    return max(0.0, start - uniform, uniform - end)


def even_uniforms(count: int) -> np.ndarray:
    """Numbers spread evenly over [0, 1): with them, counts differ from expectations by less than 2."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)
