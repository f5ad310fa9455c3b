"""The data that flows through a run: prompts, rollouts, scores, rewards, train batches and training states.

Shape letters used everywhere: P prompts, G responses per prompt, B rows, T tokens, K verifiers, V vocabulary.
Every object is frozen; a step that adds something returns a new object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length"]
Kind = Literal["model", "first_moment", "second_moment", "ema"]
Box = tuple[tuple[int, int], ...]  # start and stop in each dimension


class Message(NamedTuple):
    """One chat turn. `content` is plain text; `<image>` marks the place of the prompt's next image."""

    role: str
    content: str


class Span(NamedTuple):
    """Half-open range of token offsets inside a response."""

    start: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """One record of a data set.

    `id` is unique within a run's data, `label` chooses the terms of the reward recipe, `reference` is what the
    verifiers of that label compare with (an answer, or a list of constraints), `images` are paths or URLs in the
    order of their `<image>` markers.
    """

    id: str
    label: str
    messages: tuple[Message, ...]
    reference: Any = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One response to a prompt, exactly as it was sampled; its tokens are never encoded again.

    token_ids: int32 [T], the response including a sampled stop token.
    sampled: bool [T], False where the environment, not the policy, wrote the token.
    logprobs: float32 [T], log-probability of each token at the sampling temperature, 0 where not sampled.
    text: the decoded response without its stop token; `reasoning_text` and `answer_text` are its parts. Without a
    closed think block `reasoning_text` is None, and the answer is the whole text, or empty where a block was opened, by
    the response or by the prompt, and never closed.
    reasoning, answer: the same parts as token offsets.
    policy_version: number of policy updates behind the weights that sampled it.
    """

    token_ids: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    text: str
    reasoning_text: str | None
    answer_text: str
    reasoning: Span | None
    answer: Span
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True)
class RolloutGroup:
    """The G responses to one prompt. `draw` is the position of the prompt in the run's endless data order."""

    prompt: Prompt
    draw: int
    prompt_token_ids: np.ndarray
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Transcript:
    """A response of which the text is known, and not how it was sampled: one out of somebody's file.

    Its parts are those of a Rollout. token_ids: int32 [T], None where the file has none.
    """

    text: str
    reasoning_text: str | None
    answer_text: str
    token_ids: np.ndarray | None


class Sample(NamedTuple):
    """What a verifier looks at: a prompt and one response to it, a rollout always while a policy is trained."""

    prompt: Prompt
    rollout: Rollout | Transcript


class Asked(NamedTuple):
    """How a question to a judge's model went: which model it was, the seconds until a server had room for it, those
    from then to the answer; `cached` when the answer was known before.
    """

    model: str
    queue_s: float
    latency_s: float
    cached: bool


@dataclass(frozen=True)
class Score:
    """What one verifier says of one response. `evidence` is the short text a person would want to see.

    verdict: the judge's choice among its verdicts or grades, None where it had none to choose from. asked: None where
    no model was. disagreement: how far the judge's scores of reasoning and answer lie apart, where both were asked for.
    """

    value: float
    evidence: str
    verdict: str | None = None
    asked: Asked | None = None
    disagreement: float | None = None


@dataclass(frozen=True)
class Missing:
    """A verifier could not judge this response. Counted and limited, never turned into a number.

    unparsable: a judge answered, but with none of its verdicts.
    """

    reason: str
    unparsable: bool = False
    asked: Asked | None = None


@dataclass(frozen=True)
class Reward:
    """The reward of one response: the recipe's total and the score of each verifier that its label asks for."""

    total: float
    scores: dict[str, Score]


@dataclass(frozen=True)
class TrainBatch:
    """Packed rows, ready for a backend. All arrays are [B T].

    A row holds segments, numbered 1.. in segment_ids (int32); 0 is padding, a segment of its own. A segment is a prompt
    with its response; where responses share a prompt, the prompt is one segment and each response another. A token
    sees the tokens before it that are of its segment or of segment prefix_ids (int32), the prompt that its response
    continues; elsewhere that is its own segment again. positions: int32, from 0 at the start of each prompt. previous:
    int32, the place in the row of the token before it in its sequence.

    token_ids: int32. sampled: bool, tokens written by the policy. Values at t belong to the token at t given those
    before it in its sequence. sampling_logprobs, advantages: float32. policy_weights, kl_weights: float32, 0 wherever a
    token does not count; they already hold mask, aggregation mode, dropped samples and importance corrections.
    old_logprobs and ref_logprobs: float32, or None where the loss does not need them (old: the update is on-policy and
    the policy's own detached value is used).
    """

    token_ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    prefix_ids: np.ndarray
    previous: np.ndarray
    sampled: np.ndarray
    sampling_logprobs: np.ndarray
    advantages: np.ndarray
    policy_weights: np.ndarray
    kl_weights: np.ndarray
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None


class Piece(NamedTuple):
    """Part of a tensor: an array, where in the tensor it begins, and the shape of the whole tensor."""

    array: np.ndarray
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Where in the tensor it lies."""
        return tuple((first, first + size) for first, size in zip(self.start, self.array.shape, strict=True))


@dataclass(frozen=True)
class TrainingState:
    """What one process writes of a state: for each kind its pieces of tensors, fp32, by Hugging Face name; and the
    number of optimizer steps behind it.
    """

    tensors: Mapping[Kind, Mapping[str, Sequence[Piece]]]
    optimizer_steps: int
