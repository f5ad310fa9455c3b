"""What a step reports: metrics, rollout records and their timing. Every key is defined here, once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from common.rewards.scorer import ScoredGroup
from common.rewards.tally import Tally

# Keys of an update that are summed or maximised over the updates of a step; the others are averaged.
_SUMMED = ("tokens/trained",)
_MAXIMISED = ("policy/ratio_max",)
UPDATE_KEYS = (
    "loss/policy",
    "loss/kl",
    "policy/entropy",
    "policy/ratio_max",
    "policy/clip_fraction",
    "mismatch/kl",
    "mismatch/cut_fraction",
    "grad_norm",
    "tokens/trained",
)


class Timer:
    """Seconds spent in each phase of one step."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {"rollout": 0.0, "score": 0.0, "update": 0.0}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        started = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - started

    def metrics(self, response_tokens: int) -> dict[str, float]:
        """time/*_s and tokens_per_s, the response tokens of the step per second of the whole step."""
        step = time.perf_counter() - self._started
        phases = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        return phases | {"time/step_s": step, "tokens_per_s": response_tokens / step}


def rollout_metrics(groups: Sequence[ScoredGroup], kept: np.ndarray, tallies: Mapping[str, Tally]) -> dict[str, float]:
    """Rewards and responses of a step, over all scored groups, taught from or not; of each verifier, over all scores
    that it gave. kept: bool [P].
    """
    rewards = [reward for scored in groups for reward in scored.rewards]
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    totals = np.array([reward.total for reward in rewards])
    spread = float(totals.std(ddof=1)) if len(totals) > 1 else 0.0
    metrics = {"reward/mean": float(totals.mean()), "reward/std": spread}
    for name, tally in tallies.items():
        metrics |= tally.metrics(name)
    return metrics | {
        "response/length_mean": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "response/truncated_fraction": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "groups/uninformative_fraction": 1.0 - float(np.mean(kept)),
    }


def update_metrics(updates: Sequence[dict[str, float]], rates: Sequence[float]) -> dict[str, float]:
    """The step's updates as one record; zeros when no group taught anything.

    rates: the learning rates planned for the step. learning_rate is that of the last update that ran; a step of few
    informative groups may run fewer than planned.
    """
    metrics = {"learning_rate": rates[max(len(updates), 1) - 1]}
    for key in UPDATE_KEYS:
        values = [update[key] for update in updates] or [0.0]
        join = sum if key in _SUMMED else max if key in _MAXIMISED else np.mean
        metrics[key] = float(join(values))
    return metrics


def rollout_records(
    step: int, groups: Sequence[ScoredGroup], credit: np.ndarray, kept: np.ndarray
) -> Iterator[dict[str, Any]]:
    """One record a response: all that re-judging and replaying it needs. credit: [P G], kept: bool [P]."""
    for place, scored in enumerate(groups):
        group = scored.group
        for sample, (rollout, reward) in enumerate(zip(group.rollouts, scored.rewards, strict=True)):
            yield {
                "step": step,
                "draw": group.draw,
                "sample": sample,
                "prompt_id": group.prompt.id,
                "label": group.prompt.label,
                "messages": [message._asdict() for message in group.prompt.messages],
                "reference": group.prompt.reference,
                "images": list(group.prompt.images),
                "response": rollout.text,
                "reasoning": rollout.reasoning_text,
                "answer": rollout.answer_text,
                "spans": {"reasoning": rollout.reasoning, "answer": rollout.answer},
                "reward": reward.total,
                "scores": {name: score.value for name, score in reward.scores.items()},
                "verdicts": {name: score.verdict for name, score in reward.scores.items() if score.verdict is not None},
                "evidence": {name: score.evidence for name, score in reward.scores.items()},
                "judged_by": {name: score.asked.model for name, score in reward.scores.items() if score.asked},
                "advantage": float(credit[place, sample]),
                "trained": bool(kept[place]),
                "finish_reason": rollout.finish_reason,
                "policy_version": rollout.policy_version,
                "prompt_token_ids": group.prompt_token_ids.tolist(),
                "token_ids": rollout.token_ids.tolist(),
                "logprobs": [float(value) for value in rollout.logprobs],
            }
