"""What every trainer owes, as checks of open trainers: splits that change nothing, true metrics, a guard before the
optimizer, states that go on exactly, a reference that stays, and bfloat16 that stays in the products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from common.config.method import LossConfig
from common.data.batching import TrainSequence
from common.disk import NotSaved
from common.parity.measure import ParityTrainer
from common.state_files import open_state
from common.trainer import NonFiniteUpdate
from common.types import TrainBatch
from tests.training import (
    answered,
    packed,
    random_prompts,
    random_sequences,
    response_places,
    sampling_rule,
    save,
    saved_state,
)

# (rows of a micro-batch, changes of the packing): one micro-batch and several; packed, one sequence a row, and shared.
SPLITS: tuple[tuple[int, dict[str, bool]], ...] = (
    (32, {}),
    (3, {}),
    (8, {"packed": False}),
    (2, {"share_prompts": True}),
)
SEQUENCES = random_sequences(24)
# A loss with everything in it that reaches over tokens: sequence sums, a clip, a penalty against the reference.
SPLIT_LOSS = LossConfig(type="gspo", clip_low=0.05, clip_high=0.05, kl_type="k3_loss", kl_coef=0.1)

OpenTrainer = Callable[..., ParityTrainer]


def off_policy(batch: TrainBatch, sequences: Sequence[TrainSequence], logprobs: list[np.ndarray]) -> TrainBatch:
    """The batch with old and reference logprobs that lie around the policy's own: the same for a token everywhere."""
    old, ref = np.zeros_like(batch.advantages), np.zeros_like(batch.advantages)
    rng = np.random.default_rng(7)
    for (row, places), own in zip(response_places(batch, sequences), logprobs, strict=True):
        old[row, places] = own + rng.normal(0.0, 0.3, len(own))
        ref[row, places] = own + rng.normal(0.0, 0.3, len(own))
    return replace(batch, old_logprobs=old, ref_logprobs=ref)


def by_sequence(values: np.ndarray, batch: TrainBatch, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
    """Values [B T] at each response's tokens, in the order of the sequences."""
    return [values[row, places] for row, places in response_places(batch, sequences)]


def check_splits(open_trainer: OpenTrainer) -> None:
    """The same loss and the same gradient, to fp32 rounding, for every number of micro-batches and every packing.

    open_trainer: (rows of a micro-batch) -> trainer, always of the same model.
    """
    found: list[tuple[float, dict[str, np.ndarray]]] = []
    logprobs: list[np.ndarray] = []
    num_microbatches = set()
    for rows, packing in SPLITS:
        trainer, batch = open_trainer(rows), packed(SEQUENCES, 32, rows, **packing)
        num_microbatches.add(len(batch.token_ids) // rows)
        if not logprobs:
            logprobs = by_sequence(trainer.logprobs(batch, "policy"), batch, SEQUENCES)
        found.append(trainer.named_gradients(off_policy(batch, SEQUENCES, logprobs), SPLIT_LOSS))
    assert {1, 3, 4, 5} == num_microbatches
    loss, gradients = found[0]
    for other_loss, other_gradients in found[1:]:
        assert other_loss == pytest.approx(loss, abs=1e-6)  # of terms of size 1 that nearly cancel
        assert_close_gradients(other_gradients, gradients)


def assert_close_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], limit: float = 1e-5) -> None:
    """Per tensor, relative to its norm."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, name
        assert np.linalg.norm(ours[name] - gradient) <= limit * norm, name


def check_bfloat16(half: ParityTrainer, exact: ParityTrainer) -> None:
    """Products in bfloat16 move logprobs and gradients a little; what sums over micro-batches stays fp32, and the
    sampler's logprobs are nearer to the trainer's own than either is to fp32.
    """
    batch = packed(SEQUENCES, 32, 2)
    _, gradients = half.named_gradients(batch, LossConfig())
    assert_close_gradients(gradients, exact.named_gradients(batch, LossConfig())[1], limit=0.1)
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float32
        # A sum that had been kept in bfloat16 would end in 16 zero bits.
        assert (np.ascontiguousarray(gradient).view(np.uint32) & 0xFFFF != 0).mean() > 0.1, name

    prompts = random_prompts((5, 11, 3), 4)
    sequences = answered(prompts, half.sample(prompts, sampling_rule()))
    batch = packed(sequences, 128, 2)
    sampled = np.concatenate([sequence.sampling_logprobs for sequence in sequences])
    own, fp32 = (
        np.concatenate(by_sequence(trainer.logprobs(batch, "policy"), batch, sequences)) for trainer in (half, exact)
    )
    gap, rounding = np.sqrt(np.mean((sampled - own) ** 2)), np.sqrt(np.mean((own - fp32) ** 2))
    assert gap < rounding < 0.05


def check_metrics(trainer: ParityTrainer, model: Path, loss: LossConfig) -> None:
    """An update's record, of several micro-batches, against plain formulas; loss: `ppo_clip` with `k3_loss`."""
    sequences = [*SEQUENCES[:11], replace(SEQUENCES[11], weight=0.0)]
    batch = packed(sequences, 32, 2)
    assert len(batch.token_ids) >= 6
    logprobs = by_sequence(trainer.logprobs(batch, "policy"), batch, sequences)
    batch = off_policy(batch, sequences, logprobs)
    _, gradients = trainer.named_gradients(batch, loss)
    # The last sequence weighs nothing: no statistic counts it.
    fields = (batch.old_logprobs, batch.ref_logprobs, batch.sampling_logprobs, batch.advantages, batch.policy_weights)
    old, ref, sampling, advantage, weight = (
        np.concatenate(by_sequence(field, batch, sequences)[:-1]).astype(np.float64) for field in fields
    )
    new = np.concatenate(logprobs[:-1]).astype(np.float64)
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    held = (ratio * advantage > clipped * advantage).mean()
    assert 0.1 < held < 0.9
    expected = {
        "loss/policy": -(weight * np.minimum(ratio * advantage, clipped * advantage)).sum(),
        "loss/kl": loss.kl_coef * (weight * (np.exp(ref - new) - (ref - new) - 1)).sum(),
        "policy/entropy": _mean_entropy(model, sequences[:-1]),
        "policy/ratio_max": ratio.max(),
        "policy/clip_fraction": held,
        "mismatch/kl": (np.exp(old - sampling) - (old - sampling) - 1).mean(),
        "mismatch/cut_fraction": 0.0,
        "grad_norm": np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in gradients.values())),
        "tokens/trained": len(new),
    }
    assert trainer.update(batch, 1e-3) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def _mean_entropy(model: Path, sequences: Sequence[TrainSequence]) -> float:
    """Of the softmax at each response token, by transformers in float64."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    entropies = []
    for sequence in sequences:
        whole = np.concatenate([sequence.prompt, sequence.token_ids]).astype(np.int64)
        logits = reference(torch.from_numpy(whole)[None]).logits[0, len(sequence.prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    return float(torch.cat(entropies).mean())


def check_guard(trainer: ParityTrainer, untouched: ParityTrainer, folder: Path) -> None:
    """A loss or a gradient that is not finite changes nothing, and the next update is as if it had not been."""
    batch = packed(SEQUENCES, 32, 2)
    expected = trainer_states(untouched, [batch, batch], folder / "untouched")
    found = trainer_states(trainer, [batch], folder / "before")
    # Infinite loss; not a number; a finite loss whose gradient's norm overflows.
    for advantage in (np.inf, np.nan, 1e30):
        broken = replace(batch, advantages=np.where(batch.sampled, advantage, 0.0).astype(np.float32))
        with pytest.raises(NonFiniteUpdate, match=r"loss .*, gradient norm "):
            trainer.update(broken, 1e-3)
        assert_equal_states([_saved(trainer, folder / f"after-{advantage}")], found)
    _, gradients = trainer.named_gradients(batch, LossConfig())
    name = next(iter(gradients))
    gradients[name] = np.full_like(gradients[name], np.nan)
    with pytest.raises(NonFiniteUpdate, match="gradient norm nan"):
        trainer.apply_gradients(gradients, 1e-3)
    assert_equal_states([_saved(trainer, folder / "after-given")], found)
    assert_equal_states(trainer_states(trainer, [batch], folder / "next"), expected[1:])


def check_save_and_restore(trainer: ParityTrainer, fresh: ParityTrainer, folder: Path) -> None:
    """A state read back is the same bit for bit, and training goes on from it as if it had never stopped."""
    batches = [packed(random_sequences(12, seed=seed), 32, 2) for seed in range(4)]
    states = trainer_states(trainer, batches, folder / "whole")
    fresh.restore(folder / "whole" / "1")
    assert_equal_states([_saved(fresh, folder / "again")], states[1:2])
    assert_equal_states(trainer_states(fresh, batches[2:], folder / "resumed"), states[2:])


def check_frozen(open_trainer: OpenTrainer, folder: Path) -> None:
    """Frozen tensors have no gradient and no moments and stay what they are, decay included; the others are trained as
    if all were; and a saved state goes on.

    open_trainer: (patterns of frozen tensors) -> trainer, always of the same model of three layers.
    """
    batches = [packed(random_sequences(12, seed=seed), 32, 2) for seed in range(3)]
    everything = open_trainer([]).named_gradients(batches[0], LossConfig())[1]
    # Of a parameter that JAX stacks all layers, of the others one, and what no layer has.
    patterns = ["model.embed_tokens.*", "*.mlp.up_proj.weight", "model.layers.1.*"]
    frozen = {name for name in everything if "embed" in name or "up_proj" in name or ".1." in name}
    trainer, again = open_trainer(patterns), open_trainer(patterns)
    gradients = trainer.named_gradients(batches[0], LossConfig())[1]
    assert_close_gradients(gradients, {name: array for name, array in everything.items() if name not in frozen})

    folder.mkdir()
    save(trainer, folder)
    states = [saved_state(folder, frozen)]
    for number, batch in enumerate(batches):
        record = trainer.update(batch, 1e-2)
        if number == 0:
            norm = np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in gradients.values()))
            assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
        states.append(_saved(trainer, folder / str(number), frozen))
    for name, array in states[0].items():
        kind, tensor = name.split("/")
        assert np.array_equal(array, states[1][name]) == (kind == "model" and tensor in frozen), name
    with open_state(folder / "0") as saved, pytest.raises(NotSaved, match="does not contain tensor"):
        saved.read("first_moment", min(frozen))

    again.restore(folder / "1")
    assert_equal_states([_saved(again, folder / "again", frozen)], states[2:3])
    again.update(batches[2], 1e-2)
    assert_equal_states([_saved(again, folder / "gone-on", frozen)], states[3:])


def check_offloaded(offloaded: ParityTrainer, resumed: ParityTrainer, ordinary: ParityTrainer, folder: Path) -> None:
    """Moments that rest in host memory change nothing, not over a resume either."""
    batches = [packed(random_sequences(12, seed=seed), 32, 2) for seed in range(3)]
    states = trainer_states(ordinary, batches, folder / "ordinary")
    assert_equal_states(trainer_states(offloaded, batches, folder / "offloaded"), states)
    resumed.restore(folder / "ordinary" / "0")
    assert_equal_states(trainer_states(resumed, batches[1:], folder / "resumed"), states[1:])


def trainer_states(trainer: ParityTrainer, batches: Sequence[TrainBatch], folder: Path) -> list[dict[str, Any]]:
    """Update on each batch; the whole saved state after each, from `folder/0`, `folder/1`, ..."""
    states = []
    for step, batch in enumerate(batches):
        trainer.update(batch, 1e-3)
        states.append(_saved(trainer, folder / str(step)))
    return states


def _saved(trainer: ParityTrainer, folder: Path, frozen: Collection[str] = ()) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    save(trainer, folder)
    return saved_state(folder, frozen)


def assert_equal_states(ours: Sequence[dict[str, np.ndarray]], theirs: Sequence[dict[str, np.ndarray]]) -> None:
    """Bit for bit."""
    for left, right in zip(ours, theirs, strict=True):
        assert left.keys() == right.keys()
        for name, array in right.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(left[name], array, err_msg=name)


def check_reference(trainer: ParityTrainer, of_reference: ParityTrainer) -> None:
    """The reference answers with its own weights, before and after the policy is updated."""
    batch = packed(SEQUENCES, 32, 2)
    expected = of_reference.logprobs(batch, "policy")
    first = trainer.logprobs(batch, "policy")
    assert np.abs(first - expected).max() > 0.1
    for _ in range(2):
        np.testing.assert_allclose(trainer.logprobs(batch, "reference"), expected, atol=1e-6)
        trainer.update(replace(batch, ref_logprobs=expected), 1e-2)
    assert np.abs(trainer.logprobs(batch, "policy") - first).max() > 0.01
    assert not trainer.logprobs(batch, "policy")[~batch.sampled].any()


def check_same_reference(trainer: ParityTrainer) -> None:
    """The policy's own starting point as its reference: the penalty begins at 0, and not at what was rounded apart."""
    batch = packed(SEQUENCES, 32, 2)
    np.testing.assert_array_equal(trainer.logprobs(batch, "policy"), trainer.logprobs(batch, "reference"))
