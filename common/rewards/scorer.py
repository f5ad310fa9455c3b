"""Rollout groups -> rewards. Each response goes to the verifiers of its label and to no other.

A missing score is counted and named; it never becomes a number. Its whole group is dropped, and more than
`rewards.max_missing` of them in one step stop the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.rewards.recipe import Recipe
from common.types import Missing, Reward, RolloutGroup, Sample, Score


class ScoreMissing(RuntimeError):
    """More scores are missing than the config allows; the message names the verifier and the first reason."""


@dataclass(frozen=True)
class ScoredGroup:
    """A rollout group with one reward per response, in order."""

    group: RolloutGroup
    rewards: tuple[Reward, ...]


@dataclass(frozen=True)
class Scored:
    """What came of scoring a list of groups: the complete ones, and how many scores each verifier left out."""

    groups: tuple[ScoredGroup, ...]
    missing: dict[str, int]


class Scorer:
    """Scores groups by a recipe."""

    def __init__(self, recipe: Recipe, max_missing: int) -> None:
        self.recipe = recipe
        self._max_missing = max_missing

    def score(self, groups: Sequence[RolloutGroup], already: Scored = Scored((), {})) -> Scored:
        """Rewards of all groups, behind those that the step has already.

        Raises ScoreMissing when more scores of the step are missing than allowed, or no group of it is complete.
        """
        samples = [Sample(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        results: list[dict[str, Score | Missing]] = [{} for _ in samples]
        for name, verifier in self.recipe.verifiers.items():
            chosen = [index for index, sample in enumerate(samples) if name in self.recipe.terms[sample.prompt.label]]
            scores = verifier.score([samples[index] for index in chosen])
            for index, score in zip(chosen, scores, strict=True):
                results[index][name] = score
        new = self._collect(groups, results)
        missing = {name: already.missing.get(name, 0) + lost for name, lost in new.missing.items()}
        scored = Scored(already.groups + new.groups, missing)
        if sum(missing.values()) > self._max_missing:
            raise ScoreMissing(
                f"{_missing(results)}. Limit is {self._max_missing} a step (rewards.max_missing). "
                "Raise it to go on without the groups concerned."
            )
        if groups and not scored.groups:
            raise ScoreMissing(f"{_missing(results)}. Every group lost one, so nothing is left to train on.")
        return scored

    def _collect(self, groups: Sequence[RolloutGroup], results: list[dict[str, Score | Missing]]) -> Scored:
        complete, missing, start = [], dict.fromkeys(self.recipe.verifiers, 0), 0
        for group in groups:
            members = results[start : start + len(group.rollouts)]
            start += len(group.rollouts)
            absent = [name for member in members for name, score in member.items() if isinstance(score, Missing)]
            for name in absent:
                missing[name] += 1
            if not absent:
                terms = self.recipe.terms[group.prompt.label]
                complete.append(ScoredGroup(group, tuple(_reward(terms, member) for member in members)))
        return Scored(tuple(complete), missing)


def _missing(results: list[dict[str, Score | Missing]]) -> str:
    """Which verifier left out most, how many, and the first reason it gave."""
    missing = [(name, score) for result in results for name, score in result.items() if isinstance(score, Missing)]
    worst, lost = Counter(name for name, _ in missing).most_common(1)[0]
    asked = sum(worst in result for result in results)
    first = next(score for name, score in missing if name == worst)
    others = f" ({len(missing)} with other verifiers)" if lost < len(missing) else ""
    return f'verifier "{worst}": {lost} of {asked} scores missing{others}, the first because {first.reason}'


def _reward(terms: dict[str, float], scores: dict[str, Score | Missing]) -> Reward:
    present = {name: score for name, score in scores.items() if isinstance(score, Score)}
    return Reward(sum(weight * present[name].value for name, weight in terms.items()), present)


def score_arrays(
    groups: Sequence[ScoredGroup], recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Totals [P G], scores [P G K], presence [P G K] bool and recipe weights [P K] of groups of one size, float64."""
    names = list(recipe.verifiers)
    rewards = [scored.rewards for scored in groups]
    totals = np.array([[reward.total for reward in row] for row in rewards], np.float64)
    present = np.array([[[name in reward.scores for name in names] for reward in row] for row in rewards], bool)
    values = [[[_value(reward, name) for name in names] for reward in row] for row in rewards]
    weights = [[recipe.terms[scored.group.prompt.label].get(name, 0.0) for name in names] for scored in groups]
    return totals, np.array(values, np.float64), present, np.array(weights, np.float64)


def _value(reward: Reward, name: str) -> float:
    score = reward.scores.get(name)
    return np.nan if score is None else score.value
