"""The reward recipe: the verifiers and weights of each label, built from the config and checked against the data."""

from __future__ import annotations

from collections.abc import Iterable

from common.config.run import RewardsSection, VerifierSection
from common.config.section import ConfigError
from common.rewards.rules import RULES
from common.rewards.verifier import Verifier
from common.types import Prompt


class Recipe:
    """Verifiers by name and, per label, their weights.

    `needed` holds the labels of the data: only verifiers that one of them uses are built. Raises ConfigError for a
    label without terms, an unknown rule, options that a rule does not take, or a judge where there are none.
    """

    def __init__(self, section: RewardsSection, needed: Iterable[str]) -> None:
        self.terms = {label: dict(section.recipe.get(label, {})) for label in sorted(set(needed))}
        for label, terms in self.terms.items():
            if not terms:
                raise ConfigError(
                    f"label {label!r}: the data has it, but rewards.recipe has no terms for it. "
                    f"Labels with terms: {', '.join(sorted(section.recipe))}. Add it or correct the data."
                )
        used = {name: label for label, terms in self.terms.items() for name in terms}
        self.verifiers = {
            name: _build(name, verifier, used[name]) for name, verifier in section.verifiers.items() if name in used
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


def _build(name: str, section: VerifierSection, label: str) -> Verifier:
    if section.judge is not None:
        raise ConfigError(
            f"label {label!r} needs the judge {section.judge!r} (rewards.verifiers.{name}), and this version has rules "
            "only. Leave the label out of the data, or give it a recipe of rules."
        )
    rule = RULES.get(section.rule or "")
    if rule is None:
        raise ConfigError(
            f"rewards.verifiers.{name}.rule = {section.rule!r}: no such rule. Known: {', '.join(sorted(RULES))}."
        )
    try:
        return rule(**section.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rewards.verifiers.{name}.options = {section.options}: {error}") from None
