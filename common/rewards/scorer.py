"""Rollout groups -> rewards. Each response goes to the verifiers of its label and to no other.

A missing score is counted and named; it never becomes a number. Its whole group is dropped, and with
`rewards.on_missing: error` more than `rewards.max_missing` of them in one step stop the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from common.config.run import RewardsSection
from common.rewards.custom import source_digest
from common.rewards.recipe import Recipe
from common.rewards.tally import Tally, tally
from common.rewards.threads import Verifying
from common.team import Team
from common.types import Missing, Reward, RolloutGroup, Sample, Score

Results = list[dict[str, Score | Missing]]


class ScoreMissing(RuntimeError):
    """More scores are missing than the config allows; the message names the verifier and the first reason."""


@dataclass(frozen=True)
class ScoredGroup:
    """A rollout group with one reward per response, in order."""

    group: RolloutGroup
    rewards: tuple[Reward, ...]


@dataclass(frozen=True)
class Scored:
    """What came of scoring a list of groups: the complete ones, and what each verifier did for all of them."""

    groups: tuple[ScoredGroup, ...] = ()
    tallies: Mapping[str, Tally] = field(default_factory=dict)


class Scorer:
    """Scores groups by a recipe, all verifiers at once; of a team, each host scores its share of the groups."""

    def __init__(self, recipe: Recipe, section: RewardsSection, team: Team) -> None:
        self.recipe = recipe
        self._section = section
        self._team = team
        self._verifying = Verifying(recipe.verifiers, section.deadline_s)

    def sources(self) -> dict[str, str]:
        """A digest of each of the user's files that make scores, by the path that the config names it by."""
        verifiers = self._section.verifiers.values()
        paths = [path for each in verifiers for path in (each.rule, each.reward_model) if path and ":" in path]
        return {path: source_digest(path) for path in paths}

    def ask(self, groups: Sequence[RolloutGroup]) -> list[Results]:
        """For each group what the verifiers say of each of its responses."""
        return self._team.shared(groups, self._results_by_group, "the scores")

    def score(
        self, groups: Sequence[RolloutGroup], already: Scored = Scored(), asked: list[Results] | None = None
    ) -> Scored:
        """Rewards of all groups, behind those that the step has already; asked: what the verifiers have said of them.

        Raises ScoreMissing when more scores of the step are missing than allowed, or no group of it is complete.
        """
        by_group = self.ask(groups) if asked is None else asked
        results = [result for results in by_group for result in results]
        tallies = {name: already.tallies.get(name, Tally()) + new for name, new in self._tallies(results).items()}
        scored = Scored(already.groups + self._complete(groups, results), tallies)
        lost = sum(each.missing for each in tallies.values())
        if self._section.on_missing == "error" and lost > self._section.max_missing:
            raise ScoreMissing(
                f"{what_is_missing(results)}. Limit is {self._section.max_missing} a step (rewards.max_missing). "
                "Raise it, or set rewards.on_missing to drop, to go on without the groups concerned."
            )
        if groups and not scored.groups:
            raise ScoreMissing(f"{what_is_missing(results)}. Every group lost one, so nothing is left to train on.")
        return scored

    def _results_by_group(self, groups: Sequence[RolloutGroup]) -> list[Results]:
        results = iter(self.results([Sample(group.prompt, rollout) for group in groups for rollout in group.rollouts]))
        return [list(islice(results, len(group.rollouts))) for group in groups]

    def results(self, samples: Sequence[Sample]) -> Results:
        """For each sample the result of each verifier that its label asks for."""
        results: Results = [{} for _ in samples]
        chosen = {
            name: [index for index, sample in enumerate(samples) if self.recipe.needs(sample.prompt.label, name)]
            for name in self.recipe.verifiers
        }
        work = {name: [samples[index] for index in indices] for name, indices in chosen.items()}
        for name, scores in self._verifying.results(work).items():
            for index, score in zip(chosen[name], scores, strict=True):
                results[index][name] = score
        return results

    def _tallies(self, results: Results) -> dict[str, Tally]:
        return {name: tally([result[name] for result in results if name in result]) for name in self.recipe.verifiers}

    def _complete(self, groups: Sequence[RolloutGroup], results: Results) -> tuple[ScoredGroup, ...]:
        complete, start = [], 0
        for group in groups:
            members = results[start : start + len(group.rollouts)]
            start += len(group.rollouts)
            if not any(isinstance(score, Missing) for member in members for score in member.values()):
                label = group.prompt.label
                complete.append(ScoredGroup(group, tuple(self.recipe.reward(label, member) for member in members)))
        return tuple(complete)


def what_is_missing(results: Results) -> str:
    """Which verifier left out most, how many, and the first reason it gave."""
    missing = [(name, score) for result in results for name, score in result.items() if isinstance(score, Missing)]
    worst, lost = Counter(name for name, _ in missing).most_common(1)[0]
    asked = sum(worst in result for result in results)
    first = next(score for name, score in missing if name == worst)
    others = f" ({len(missing)} with other verifiers)" if lost < len(missing) else ""
    return f'verifier "{worst}": {lost} of {asked} scores missing{others}, the first because {first.reason}'


def labels(groups: Sequence[ScoredGroup]) -> list[str]:
    """The label of each group's prompt."""
    return [scored.group.prompt.label for scored in groups]


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
