"""The reward recipe: the verifiers and weights of each label, built from the config and checked against the data."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

from pydantic import create_model

from common.config.run import RewardsSection, VerifierSection
from common.config.section import ConfigError, Section
from common.config.sentences import Origin, parse_table, sentence
from common.rewards.rules import RULES
from common.rewards.verifier import Verifier
from common.types import Prompt


class Recipe:
    """Verifiers by name and, per label, their weights.

    `needed` holds the labels of the data: only verifiers that one of them uses are built. `origin` says where a config
    key was set. Raises ConfigError for a label without terms, an unknown rule, options that a rule does not take, or a
    judge, of which there are none.
    """

    def __init__(self, section: RewardsSection, needed: Iterable[str], origin: Origin) -> None:
        self.terms = {label: dict(section.recipe.get(label, {})) for label in sorted(set(needed))}
        for label, terms in self.terms.items():
            if not terms:
                raise ConfigError(
                    f"rewards.recipe ({origin('rewards.recipe')}): has no terms for the data's label {label!r}. "
                    f"Labels with terms: {', '.join(sorted(section.recipe))}. Add it or correct the data."
                )
        used = {name: label for label, terms in self.terms.items() for name in terms}
        self.verifiers = {
            name: _build(f"rewards.verifiers.{name}", verifier, used[name], origin)
            for name, verifier in section.verifiers.items()
            if name in used
        }

    def check(self, prompt: Prompt) -> None:
        """Raise ConfigError when a verifier of the prompt's label cannot use its reference."""
        for name in self.terms[prompt.label]:
            try:
                self.verifiers[name].check_reference(prompt)
            except ValueError as error:
                raise ConfigError(
                    f"prompt {prompt.id!r} (label {prompt.label!r}), verifier {name!r}: {error}"
                ) from None

    def close(self) -> None:
        """End the workers that verifiers hold."""
        for verifier in self.verifiers.values():
            verifier.close()


def _build(key: str, section: VerifierSection, label: str, origin: Origin) -> Verifier:
    """The verifier that stands at a config key and that a label needs."""
    if section.judge is not None:
        problem = (
            f"label {label!r} needs this judge, and this version has rules only. Leave the label out of the data, "
            "or give it a recipe of rules."
        )
        raise ConfigError(sentence(f"{key}.judge", section.judge, origin(f"{key}.judge"), problem))
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
