"""What a backend implements: the one object through which the method touches an engine.

Structural typing: no base class, no registry. Arrays cross this line as host numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from common.types import FinishReason, TrainBatch, TrainingState


@dataclass(frozen=True)
class Sampling:
    """How the embedded sampler picks tokens.

    Logprobs are those of the softmax at `temperature` (1 when greedy), before top-k and top-p cut it, so that they
    compare with the trainer's. `rows` responses are decoded side by side; `stop_ids` end a response and belong to it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    rows: int


class SamplingPrompt(NamedTuple):
    """One prompt to answer: token_ids int32 [S]; uniforms float32 [G max_new_tokens], one per token to sample."""

    token_ids: np.ndarray
    uniforms: np.ndarray


class Response(NamedTuple):
    """One sampled response: token_ids int32 [T] with its stop token, logprobs float32 [T]."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason


class NonFiniteUpdate(ArithmeticError):
    """The loss or the gradient of an update is not finite; raised before the optimizer has changed anything."""


class PolicyTrainer(Protocol):
    """A policy, its optimizer and a frozen reference model on some engine."""

    def update(self, batch: TrainBatch, learning_rate: float) -> dict[str, float]:
        """One optimizer step over all rows of the batch, in micro-batches.

        Returns loss/policy, loss/kl, policy/entropy, policy/ratio_max, policy/clip_fraction, mismatch/kl,
        mismatch/cut_fraction, grad_norm and tokens/trained. Raises NonFiniteUpdate.
        """
        ...

    def logprobs(self, batch: TrainBatch, which: Literal["policy", "reference"]) -> np.ndarray:
        """float32 [B T], each token's log-probability at the sampling temperature; 0 where a segment starts."""
        ...

    def sample(self, prompts: Sequence[SamplingPrompt], sampling: Sampling) -> list[list[Response]]:
        """G responses for each prompt, in the order of the prompts and of their uniforms."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """While it is open, the average of the weights (`EmaSection`) stands in the policy's place."""
        ...

    def snapshot(self) -> TrainingState:
        """A copy, in host memory, of what this process writes of parameters, optimizer moments and average: what it has
        of them and no process before it has. No later update changes it.
        """
        ...

    def restore(self, directory: Path) -> None:
        """Take over a state that `common/state_files.py` holds, bit for bit, from any number of processes and either
        engine; only what this process has of it is read.

        An average that the state does not have begins with the weights. Raises NotSaved where it cannot be read.
        """
        ...

    def peak_memory_gib(self) -> float:
        """Highest memory use of this process so far: the accelerator's allocator, or resident memory on a CPU."""
        ...
