"""The same logits and the same numbers give the same tokens on both engines."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from common.trainer import Sampling
from safework_jax.token_choice import choose as choose_jax
from safework_torch.token_choice import choose as choose_torch
from tests.inverse_cdf import distance_from, softmax, truncated
from tests.training import sampling_rule

ROWS = 1000


@pytest.mark.parametrize("vocabulary", [320, 2000])
@pytest.mark.parametrize(
    "rule",
    [
        sampling_rule(),
        sampling_rule(temperature=0.7),
        sampling_rule(top_k=7),
        sampling_rule(temperature=1.3, top_p=0.9),
        sampling_rule(temperature=0.0),
    ],
)
def test_engines_choose_alike(rule: Sampling, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(0.0, 3.0, (ROWS, vocabulary)).astype(np.float32)
    uniforms = rng.random(ROWS, np.float32)
    tokens, logprobs = (x.numpy() for x in choose_torch(torch.tensor(logits), torch.tensor(uniforms), rule))
    jax_tokens, jax_logprobs = (np.asarray(x) for x in jax.jit(choose_jax, static_argnums=2)(logits, uniforms, rule))
    same = tokens == jax_tokens
    np.testing.assert_allclose(logprobs[same], jax_logprobs[same], atol=1e-5)
    # The two sum in another order: a number within rounding of a boundary may fall on either side of it.
    assert same.mean() >= 0.999
    for row in np.flatnonzero(~same):
        kept = truncated(softmax(logits[row : row + 1], rule.temperature)[0], rule.top_k, rule.top_p)
        for choice in (tokens[row], jax_tokens[row]):
            assert distance_from(kept, choice, float(uniforms[row])) < 1e-6
