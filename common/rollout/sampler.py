"""Prompts -> rollout groups, tokens in and tokens out.

Sampling is counter-based: each token has its own uniform number, fixed by (run seed, stream, step, draw, sample,
position). There is no generator state to save, a resumed run is exact, and both engines draw nearly the same rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from common.config.run import RolloutSection
from common.config.section import ConfigError
from common.data.chat import Chat
from common.trainer import PolicyTrainer, Sampling, SamplingPrompt
from common.types import Prompt, RolloutGroup

Stream = Literal["train", "heldout"]
_STREAM_KEYS = {"train": 0, "heldout": 1}


class Draw(NamedTuple):
    """A prompt at its place in the data order."""

    place: int
    prompt: Prompt


def uniforms(seed: int, stream: Stream, step: int, draw: int, num_samples: int, length: int) -> np.ndarray:
    """One number in [0, 1) per token of each sample: float32 [num_samples length]."""
    keys = [[seed, _STREAM_KEYS[stream], step, draw, sample] for sample in range(num_samples)]
    return np.stack([np.random.Generator(np.random.Philox(key)).random(length, np.float32) for key in keys])


def sampling_rule(section: RolloutSection, chat: Chat) -> Sampling:
    """The config's sampling rule in token ids. Raises ConfigError for a stop string that is not one token."""
    unknown = [text for text in section.stop if text not in chat.vocabulary]
    if unknown:
        raise ConfigError(
            f"rollout.stop = {unknown!r}: not single tokens of this model. Name tokens as its tokenizer does."
        )
    return Sampling(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens,
        stop_ids=tuple(sorted({*chat.stop_ids, *(chat.vocabulary[text] for text in section.stop)})),
        rows=section.rows,
    )


class RolloutSampler:
    """Draws groups of responses from the policy for a run with a given seed."""

    def __init__(self, trainer: PolicyTrainer, chat: Chat, section: RolloutSection, seed: int) -> None:
        self._trainer = trainer
        self._chat = chat
        self._section = section
        self._seed = seed
        self._rule = sampling_rule(section, chat)

    def groups(
        self, draws: Sequence[Draw], stream: Stream, step: int, num_samples: int, policy_version: int
    ) -> list[RolloutGroup]:
        """`num_samples` responses to each draw, in order."""
        prompts = [self._sampling_prompt(draw, stream, step, num_samples) for draw in draws]
        groups = []
        for draw, prompt, responses in zip(draws, prompts, self._trainer.sample(prompts, self._rule), strict=True):
            opened = self._chat.opens_reasoning(draw.prompt.messages)
            rollouts = tuple(
                self._chat.rollout(*response, policy_version=policy_version, opened=opened) for response in responses
            )
            groups.append(RolloutGroup(draw.prompt, draw.place, prompt.token_ids, rollouts))
        return groups

    def _sampling_prompt(self, draw: Draw, stream: Stream, step: int, num_samples: int) -> SamplingPrompt:
        numbers = uniforms(self._seed, stream, step, draw.place, num_samples, self._section.max_new_tokens)
        return SamplingPrompt(self._chat.encode_prompt(draw.prompt.messages), numbers)
