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


def exact_weights(rows: int, vocabulary: int) -> np.ndarray:
    """Whole numbers whose sums fp32 holds exactly, [R V]; about half of them 0, whole blocks among them."""
    rng = np.random.default_rng(vocabulary)
    weights = rng.integers(0, 8, (rows, vocabulary)) * (rng.random((rows, vocabulary)) < 0.6)
    for row in range(rows):
        start = rng.integers(0, vocabulary)
        weights[row, start : start + 300] = 0
        weights[row, rng.integers(0, vocabulary)] = 5
    return weights.astype(np.float32)


def exact_uniforms(weights: np.ndarray) -> np.ndarray:
    """Numbers [R] whose product with the row's total fp32 holds exactly: 0, the largest below 1, multiples of 1/256."""
    uniforms = np.random.default_rng(1).integers(0, 256, len(weights)).astype(np.float32) / 256
    uniforms[0], uniforms[1] = 0.0, LARGEST_UNIFORM
    return uniforms


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
