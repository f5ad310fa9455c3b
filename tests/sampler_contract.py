"""What every embedded sampler owes, as checks of an open trainer: greedy equals transformers' `generate`, sampled
tokens and logprobs equal those of whole forward passes and the trainer's own, and rows do not know of each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from common.trainer import PolicyTrainer, Response, Sampling, SamplingPrompt
from tests.inverse_cdf import distance_from, softmax, truncated
from tests.tiny import make_model
from tests.training import answered, packed, random_prompts, response_places, sampling_rule

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True}
# name: (model type, changes of tests/tiny.py's model)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2-sliding": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
LENGTHS = (5, 11, 3, 8, 17)
STOPS = tuple(range(100, 112))
RULES = {
    "plain": sampling_rule(),
    "cooler": sampling_rule(temperature=0.7),
    "stops": sampling_rule(stop_ids=STOPS),
    "cut": sampling_rule(temperature=1.4, top_k=20, top_p=0.9, stop_ids=STOPS),
}
GREEDY_CASES = [("llama", ()), *((name, STOPS) for name in MODELS)]
SAMPLED_CASES = [*((name, "plain") for name in MODELS), *(("llama", rule) for rule in RULES if rule != "plain")]


def make_folder(folder: Path, name: str) -> Path:
    """The folder of one of `MODELS`."""
    model_type, changes = MODELS[name]
    return make_model(folder / name, model_type, **changes)


def check_greedy(trainer: PolicyTrainer, folder: Path, stop_ids: tuple[int, ...]) -> None:
    """Token for token what transformers generates from prompts padded on the left."""
    prompts = random_prompts(LENGTHS, 1)
    rule = sampling_rule(temperature=0.0, stop_ids=stop_ids)
    expected = _generate(folder, prompts, rule.max_new_tokens, stop_ids)
    assert [response.token_ids.tolist() for [response] in trainer.sample(prompts, rule)] == expected
    assert len({len(tokens) for tokens in expected}) > 1 or not stop_ids


def _generate(folder: Path, prompts: list[SamplingPrompt], num_tokens: int, stop_ids: tuple[int, ...]) -> list[Any]:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    lengths = np.array([len(prompt.token_ids) for prompt in prompts])
    token_ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        token_ids[row, longest - len(prompt.token_ids) :] = prompt.token_ids
    mask = np.arange(longest) >= longest - lengths[:, None]
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    out = _reference_model(folder).generate(
        torch.from_numpy(token_ids), attention_mask=torch.from_numpy(mask).long(), generation_config=settings
    )
    return [_cut(row, stop_ids) for row in out[:, longest:].tolist()]


def _reference_model(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def _cut(token_ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    ends = [place for place, token in enumerate(token_ids) if token in stop_ids]
    return token_ids[: ends[0] + 1] if ends else token_ids


def check_sampled(trainer: PolicyTrainer, folder: Path, rule: Sampling) -> None:
    """Each token is the one its number falls on in transformers' softmax; logprobs are the uncut softmax's and the
    trainer's own on the packed batch.
    """
    prompts = random_prompts(LENGTHS, 4)
    groups, reference = trainer.sample(prompts, rule), _reference_model(folder)
    for prompt, group in zip(prompts, groups, strict=True):
        for numbers, response in zip(prompt.uniforms, group, strict=True):
            everything = softmax(_logits(reference, prompt, response), rule.temperature)
            for step, token in enumerate(response.token_ids):
                kept = truncated(everything[step], rule.top_k, rule.top_p)
                assert kept[token] > 0
                assert distance_from(kept, token, float(numbers[step])) < 1e-4
                assert abs(np.log(everything[step, token]) - response.logprobs[step]) < 1e-4
    sequences = answered(prompts, groups)
    batch = packed(sequences, 128, 2, share_prompts=True)
    recomputed = trainer.logprobs(batch, "policy")
    for sequence, (row, places) in zip(sequences, response_places(batch, sequences), strict=True):
        np.testing.assert_allclose(sequence.sampling_logprobs, recomputed[row, places], atol=1e-5)


@torch.no_grad()
def _logits(model: Any, prompt: SamplingPrompt, response: Response) -> np.ndarray:
    """Logits [T V] of each token of a response, from one pass over the whole sequence."""
    whole = np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int64)
    return model(torch.from_numpy(whole)[None]).logits[0, len(prompt.token_ids) - 1 : -1].numpy()


def check_shape(trainer: PolicyTrainer) -> None:
    """G responses a prompt; a stop token ends a response and belongs to it; none is longer than allowed."""
    rule, prompts = sampling_rule(stop_ids=STOPS, max_new_tokens=9), random_prompts(LENGTHS, 6)
    groups = trainer.sample(prompts, rule)
    assert [len(group) for group in groups] == [6] * len(LENGTHS)
    reasons = set()
    for response in (response for group in groups for response in group):
        assert response.token_ids.dtype == np.int32 and response.logprobs.dtype == np.float32
        assert 1 <= len(response.token_ids) == len(response.logprobs) <= 9
        stopped = [int(token) in STOPS for token in response.token_ids]
        assert not any(stopped[:-1])
        assert response.finish_reason == ("stop" if stopped[-1] else "length")
        assert stopped[-1] or len(stopped) == 9
        reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}


def check_independence(trainer: PolicyTrainer) -> None:
    """The same responses whatever decodes side by side: fewer rows, prompts alone, prompts in another order."""
    prompts = random_prompts(LENGTHS, 6)

    def rule(rows: int) -> Sampling:
        return sampling_rule(stop_ids=STOPS, rows=rows)

    together = trainer.sample(prompts, rule(64))
    # Responses end one after the other, so finished rows leave the batch many times on the way.
    assert len({len(response.token_ids) for group in together for response in group}) > 5
    for rows in (1, 7):
        _assert_same(trainer.sample(prompts, rule(rows)), together)
    _assert_same([trainer.sample([prompt], rule(64))[0] for prompt in prompts], together)
    _assert_same(trainer.sample(prompts[::-1], rule(64))[::-1], together)


def _assert_same(ours: list[list[Response]], theirs: list[list[Response]]) -> None:
    for group, other_group in zip(ours, theirs, strict=True):
        for response, other in zip(group, other_group, strict=True):
            assert response.token_ids.tolist() == other.token_ids.tolist()
            assert response.finish_reason == other.finish_reason
            np.testing.assert_allclose(response.logprobs, other.logprobs, atol=1e-5)
