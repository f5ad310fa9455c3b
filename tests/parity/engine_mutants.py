"""Small numeric bugs in either engine, each to be noticed by a rung of the ladder."""

from __future__ import annotations

from tests.parity.mutants import Mutant

_TORCH = [
    Mutant(
        "torch predicts a token from itself",
        "safework_torch/model.py",
        'shape[1] + own["previous"][row, place]',
        "shape[1] + place",
        "logprob difference",
    ),
    Mutant(
        "torch trains on every token",
        "safework_torch/model.py",
        'own["sampled"].nonzero()',
        '(own["segment_ids"] > 0).nonzero()',
        "logprob difference",
    ),
    Mutant(
        "torch logprobs ignore the temperature",
        "safework_torch/token_logprobs.py",
        "return chosen / temperature",
        "return chosen",
        "logprob difference",
    ),
    Mutant(
        "torch gradients ignore the temperature",
        "safework_torch/token_logprobs.py",
        "factor = upstream / temperature",
        "factor = upstream",
        "gradient norm ratio - 1, on-policy",
    ),
    Mutant(
        "torch sequences see their neighbours",
        "safework_torch/attention.py",
        "seen & (place[:, None] >= place)",
        "(seen | ~seen) & (place[:, None] >= place)",
        "logprob difference",
    ),
    Mutant(
        "torch responses do not see a shared prompt",
        "safework_torch/attention.py",
        " | (prefixes[:, None, :, None] == keys)",
        "",
        "logprob difference",
    ),
    Mutant(
        "torch leaves padding_idx on the embedding",
        "safework_torch/model.py",
        "    embedding.padding_idx = None\n",
        "",
        "gradient relative L2, on-policy",
    ),
    Mutant(
        "torch averages micro-batches",
        "safework_torch/trainer.py",
        "            loss.backward()\n",
        "            (loss * len(rows.targets) / batch.sampled.sum()).backward()\n",
        "gradient norm ratio - 1, on-policy",
    ),
    Mutant(
        "torch adds eps inside the root",
        "safework_torch/optimizer.py",
        ".sqrt_().add_(config.eps)",
        ".add_(config.eps).sqrt_()",
        "update, same gradients",
    ),
    Mutant(
        "torch corrects no bias of the first moment",
        "safework_torch/optimizer.py",
        "(m / numbers.first_correction)",
        "(m / 1.0)",
        "update, same gradients",
    ),
    Mutant(
        "torch inverts the clip coefficient",
        "safework_torch/optimizer.py",
        "torch.full_like(norm, config.clip_norm) / norm",
        "norm / config.clip_norm",
        "first moment, same gradients",
    ),
    Mutant(
        "torch decays vectors too",
        "safework_torch/optimizer.py",
        "self.named[name].ndim >= 2",
        "self.named[name].ndim >= 1",
        "update, same gradients",
    ),
    Mutant(
        "torch decodes every token at one position",
        "safework_torch/sampling.py",
        "rows.layout.positions(slots[-1:])",
        "rows.layout.positions(slots[-2:])",
        "greedy tokens that differ",
    ),
]

_JAX = [
    Mutant(
        "jax predicts a token from itself",
        "safework_jax/token_logprobs.py",
        "places = previous + tokens",
        "places = jnp.arange(tokens) + tokens",
        "logprob difference",
    ),
    Mutant(
        "jax trains on every token",
        "safework_jax/token_logprobs.py",
        "jnp.where(wanted, x",
        "jnp.where(wanted | True, x",
        "logprob difference",
    ),
    Mutant(
        "jax logprobs ignore the temperature",
        "safework_jax/token_logprobs.py",
        "scaled = _wide(logits, chosen, targets) / chunks.temperature",
        "scaled = _wide(logits, chosen, targets) / 1.0",
        "logprob difference",
    ),
    Mutant(
        "jax gradients ignore the temperature",
        "safework_jax/token_logprobs.py",
        "(upstream / temperature)",
        "(upstream / 1.0)",
        "gradient norm ratio - 1, on-policy",
    ),
    Mutant(
        "jax sequences see their neighbours",
        "safework_jax/attention.py",
        "earlier & seen & near",
        "earlier & near",
        "logprob difference",
    ),
    Mutant(
        "jax responses do not see a shared prompt",
        "safework_jax/attention.py",
        " | (prefix_ids[:, :, None] == keys)",
        "",
        "logprob difference",
    ),
    Mutant(
        "jax turns by another rotary base",
        "safework_jax/models/decoder/rope.py",
        'rope["rope_type"], rope["rope_theta"]',
        'rope["rope_type"], 2.0 * rope["rope_theta"]',
        "logprob difference",
    ),
    Mutant(
        "jax swaps the norms of queries and keys",
        "safework_jax/models/decoder/text.py",
        "self.query_norm(query, x.dtype), self.key_norm(key, x.dtype)",
        "self.key_norm(query, x.dtype), self.query_norm(key, x.dtype)",
        "logprob difference",
    ),
    Mutant(
        "jax averages micro-batches",
        "safework_jax/programs.py",
        "jax.tree.map(jnp.add, gradients,",
        "jax.tree.map(lambda held, fresh: (held + fresh) / 2, gradients,",
        "gradient norm ratio - 1, on-policy",
    ),
    Mutant(
        "jax decays stacked norms",
        "safework_jax/optimizer.py",
        "leaf.ndim - is_stacked(parameter_path(path)) >= 2",
        "leaf.ndim >= 2",
        "update, same gradients",
    ),
    Mutant(
        "jax adds eps inside the root",
        "safework_jax/optimizer.py",
        "config.beta1, config.beta2, config.eps)",
        "config.beta1, config.beta2, 0.0, config.eps)",
        "update, same gradients",
    ),
    Mutant(
        "jax corrects bias as if a hundred steps were behind",
        "safework_jax/optimizer.py",
        "adam.update(gradients, moments)",
        "adam.update(gradients, moments._replace(count=moments.count + 100))",
        "update, same gradients",
    ),
    Mutant(
        "jax inverts the clip coefficient",
        "safework_jax/optimizer.py",
        "config.clip_norm / norm, 1.0",
        "norm / config.clip_norm, 1.0",
        "first moment, same gradients",
    ),
]

ENGINE_MUTANTS = (*_TORCH, *_JAX)
