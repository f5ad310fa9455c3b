"""Chunked logprobs and entropies of the torch engine against a whole log-softmax in float64, gradients included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from safework_torch import token_logprobs

DIM, VOCABULARY = 12, 57
CHUNK = token_logprobs.CHUNK["cpu"]


def inputs(rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Hidden states [B T D], weight [V D], token ids [B T], previous [B T], wanted [B T].

    Every seventh token is predicted from a place far back, as where responses share a prompt.
    """
    generator = torch.Generator().manual_seed(rows * 10_000 + tokens)
    hidden = torch.randn((rows, tokens, DIM), generator=generator)
    weight = torch.randn((VOCABULARY, DIM), generator=generator)
    token_ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    wanted = torch.rand((rows, tokens), generator=generator) < 0.7
    previous = torch.arange(-1, tokens - 1).tile(rows, 1)
    previous[:, ::7] //= 2
    previous[:, 0], wanted[:, 0], wanted[0, 1] = 0, False, True
    return hidden, weight, token_ids, previous, wanted


def chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    previous: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is tested, [B T] like the formula below."""
    rows, places = wanted.nonzero(as_tuple=True)
    before = rows * wanted.shape[1] + previous[rows, places]
    targets = token_ids[rows, places]
    values = token_logprobs.token_logprobs(hidden, weight, targets, before, temperature)
    zeros = torch.zeros(wanted.shape)
    logprobs, entropy = (zeros.index_put((rows, places), value) for value in values)
    return logprobs, entropy


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    previous: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, in the dtype of its inputs, with all logits at once."""
    before = torch.stack([row[places] for row, places in zip(hidden, previous, strict=True)])
    everything = torch.log_softmax(before @ weight.T / temperature, dim=-1)
    chosen = everything.gather(-1, token_ids[..., None])[..., 0]
    entropy = -(everything.exp() * everything).sum(dim=-1)
    return chosen * wanted, entropy * wanted


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (3, 40), (2, 700), (5, 206)])
def test_values_and_gradients_equal_the_plain_formula(rows: int, tokens: int, temperature: float) -> None:
    hidden, weight, token_ids, previous, wanted = inputs(rows, tokens)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for function, dtype in ((chunked, torch.float32), (plain, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        logprobs, entropy = function(*leaves, token_ids, previous, wanted, temperature)
        (logprobs * upstream).sum().backward()
        found.append((logprobs, entropy, *(leaf.grad for leaf in leaves)))
    for ours, exact in zip(*found, strict=True):
        assert_close(ours.detach(), exact.detach())
    logprobs, entropy = found[0][:2]
    assert (logprobs[wanted] < 0).all() and (entropy[wanted] > 0).all()
    assert not logprobs[~wanted].any() and not entropy[~wanted].any()


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_every_number_of_wanted_tokens_around_the_chunk_size(count: int) -> None:
    hidden, weight, token_ids, previous, wanted = inputs(1, 2 * CHUNK + 10)
    wanted = torch.arange(wanted.shape[1])[None] > wanted.shape[1] - count - 1
    assert wanted.sum() == count
    logprobs, entropy = chunked(hidden, weight, token_ids, previous, wanted, 1.0)
    exact = plain(hidden.double(), weight.double(), token_ids, previous, wanted, 1.0)
    assert_close(logprobs, exact[0])
    assert_close(entropy, exact[1])


def test_large_logits_stay_exact() -> None:
    hidden, weight, token_ids, previous, wanted = inputs(2, 50)
    logprobs, entropy = chunked(30 * hidden, weight, token_ids, previous, wanted, 1.0)
    exact = plain(30 * hidden.double(), weight.double(), token_ids, previous, wanted, 1.0)
    assert exact[0].min() < -100
    torch.testing.assert_close(logprobs.double(), exact[0], rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-3, atol=1e-4)


def test_nothing_wanted_is_zero_with_zero_gradient() -> None:
    hidden, weight, token_ids, previous, wanted = inputs(2, 9)
    hidden.requires_grad_()
    logprobs, _ = chunked(hidden, weight, token_ids, previous, torch.zeros_like(wanted), 1.0)
    logprobs.sum().backward()
    assert not logprobs.any() and not hidden.grad.any()


def test_entropy_carries_no_gradient() -> None:
    hidden, weight, token_ids, previous, wanted = inputs(2, 9)
    _, entropy = chunked(hidden.requires_grad_(), weight, token_ids, previous, wanted, 1.0)
    assert not entropy.requires_grad


def test_bfloat16_hidden_states_give_fp32_logprobs() -> None:
    hidden, weight, token_ids, previous, wanted = inputs(2, 60)
    logprobs, _ = chunked(hidden.bfloat16(), weight.bfloat16(), token_ids, previous, wanted, 1.0)
    assert logprobs.dtype == torch.float32
    exact, _ = plain(hidden.bfloat16().double(), weight.bfloat16().double(), token_ids, previous, wanted, 1.0)
    # The product is rounded to bfloat16: 8 bits of a logit of size 10.
    assert (logprobs - exact).abs().max() < 0.1


def test_a_targets_logit_is_not_rounded() -> None:
    hidden = torch.tensor([[[2.0, 2.0**-8], [0.0, 0.0]]]).bfloat16().requires_grad_()
    weight = torch.zeros((VOCABULARY, 2))
    weight[7] = 1.0  # the only logit that is not 0: 2.0039, which bfloat16 has as 2
    arrays = torch.tensor([[0, 7]]), torch.tensor([[0, 0]]), torch.tensor([[False, True]])
    logprobs, entropy = chunked(hidden, weight.bfloat16(), *arrays, 1.0)
    exact = plain(hidden.detach().double(), weight.double(), *arrays, 1.0)
    for ours, expected in zip((logprobs, entropy), exact, strict=True):
        torch.testing.assert_close(ours.detach().double(), expected, rtol=0.0, atol=1e-6)
    logprobs.sum().backward()
    slope = (1.0 - exact[0][0, 1].exp()).expand(2).bfloat16()
    torch.testing.assert_close(hidden.grad[0, 0], slope, rtol=2.0**-8, atol=0.0)


PEAK_GROWTH = """
import resource, torch
from safework_torch.token_logprobs import token_logprobs
def peak(tokens, vocabulary=1 << 15):
    hidden = torch.randn((1, tokens, 8)).requires_grad_()
    weight = torch.randn((vocabulary, 8)).requires_grad_()
    places = torch.arange(1, tokens)
    token_logprobs(hidden, weight, places, places - 1, 0.7)[0].sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(-peak(600) + peak(2600))
"""


def test_peak_memory_does_not_grow_by_tokens_times_vocabulary() -> None:
    run = subprocess.run([sys.executable, "-c", PEAK_GROWTH], capture_output=True, text=True, check=True)
    # 2,000 more tokens x 32,768 x 4 bytes = 250 MiB for one array of all logits.
    assert float(run.stdout) < 60
