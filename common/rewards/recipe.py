"""The reward recipe: the verifiers and weights of each label, built from the config and checked against the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from pydantic import create_model

from common.config.judging import JudgeSection
from common.config.run import RewardsSection, VerifierSection
from common.config.section import ConfigError, Section
from common.config.sentences import Origin, parse_table, sentence
from common.rewards.custom import custom_reward_model, custom_rule
from common.rewards.judges.judge import Judge
from common.rewards.rules import RULES
from common.rewards.verifier import Verifier
from common.serving.servers import Servers
from common.types import Missing, Prompt, Reward, Score


class Recipe:
    """Verifiers by name and, per label, their weights.

    `needed` holds the labels of the data: only verifiers that one of them uses are built. `origin` says where a config
    key was set. Raises ConfigError for a label without terms, an unknown rule, or options that a rule does not take,
    and ServerError for a judge whose server cannot be used.
    """

    def __init__(self, section: RewardsSection, servers: Servers, needed: Iterable[str], origin: Origin) -> None:
        self._servers = servers
        self.terms = {label: dict(section.recipe.get(label, {})) for label in sorted(set(needed))}
        self.gates = {label: tuple(section.gates.get(label, ())) for label in self.terms}
        for label, terms in self.terms.items():
            if not terms:
                raise ConfigError(
                    f"rewards.recipe ({origin('rewards.recipe')}): has no terms for the data's label {label!r}. "
                    f"Labels with terms: {', '.join(sorted(section.recipe))}. Add it or correct the data."
                )
        self.verifiers = {
            name: self._verifier(name, verifier, section.judges, origin)
            for name, verifier in section.verifiers.items()
            if any(self.needs(label, name) for label in self.terms)
        }

    def _verifier(
        self, name: str, section: VerifierSection, judges: Mapping[str, JudgeSection], origin: Origin
    ) -> Verifier:
        key = f"rewards.verifiers.{name}"
        if section.judge:
            return self._judge(name, judges[section.judge])
        if section.reward_model:
            return custom_reward_model(name, section.reward_model, section.options, key, origin)
        if section.rule and ":" in section.rule:
            return custom_rule(name, section.rule, section.options, key, origin)
        return _rule(key, section, origin)

    def _judge(self, name: str, section: JudgeSection) -> Judge:
        return Judge(name, section, self._servers.open(section.server))

    def needs(self, label: str, name: str) -> bool:
        """Whether samples of a label go to a verifier."""
        return name in self.terms[label] or name in self.gates[label]

    def reward(self, label: str, scores: Mapping[str, Score | Missing]) -> Reward:
        """The total of a response of this label, none of its scores missing: the weighted sum of terms, times gates.

        Raises ConfigError for a gate below 0, which would turn a bad total into a good one, and for a total that no
        number holds.
        """
        present = {name: score for name, score in scores.items() if isinstance(score, Score)}
        total = sum(weight * present[name].value for name, weight in self.terms[label].items())
        for name in self.gates[label]:
            if present[name].value < 0:
                raise ConfigError(
                    f"verifier {name!r} gave {present[name].value:.4g}, and it is a gate of label {label!r}, which "
                    "multiplies. Let it give scores from 0 up, or make it a term."
                )
        total *= math.prod(present[name].value for name in self.gates[label])
        if not math.isfinite(total):
            raise ConfigError(
                f"rewards.recipe.{label}: a total of its scores is {total}, beyond what a number holds. Give its terms "
                "smaller weights."
            )
        return Reward(total, present)

    def check(self, prompt: Prompt) -> None:
        """Raise ConfigError when a verifier of the prompt's label cannot use its reference."""
        for name in [name for name in self.verifiers if self.needs(prompt.label, name)]:
            try:
                self.verifiers[name].check_reference(prompt)
            except ValueError as error:
                raise ConfigError(
                    f"prompt {prompt.id!r} (label {prompt.label!r}), verifier {name!r}: {error}"
                ) from None

    def close(self) -> None:
        """End the workers that verifiers hold, and the connections of judges."""
        for verifier in self.verifiers.values():
            verifier.close()
        self._servers.close()


def _rule(key: str, section: VerifierSection, origin: Origin) -> Verifier:
    """The rule that stands at a config key."""
    rule = RULES.get(section.rule or "")
    if rule is None:
        problem = f"is no rule. Choose one of {', '.join(sorted(RULES))}."
        raise ConfigError(sentence(f"{key}.rule", section.rule, origin(f"{key}.rule"), problem))
    options = parse_table(_options_section(rule), section.options, f"{key}.options", origin)
    try:
        return rule(**options.model_dump())
    except ValueError as error:
        raise ConfigError(sentence(f"{key}.options", section.options, origin(f"{key}.options"), str(error))) from None


def _options_section(rule: type[Verifier]) -> type[Section]:
    """A rule's constructor arguments as a config section, so that its options are checked like any other key."""
    fields: dict[str, Any] = {
        parameter.name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for parameter in signature(rule, eval_str=True).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    return create_model(rule.__name__, __base__=Section, **fields)
