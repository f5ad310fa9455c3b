"""What a record's scores depend on -> the key under which they are kept."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from common.config import LoadedConfig
from common.data.images import image_url
from common.rewards.custom import source_digest
from common.rewards.judges.judge import Judge
from common.rewards.judges.question import FORM
from common.rewards.recipe import Recipe
from common.scoring.entries import Entry
from common.scoring.scores_file import Name

_LENGTH = 16


class Naming:
    """Names entries under a config and its recipe."""

    def __init__(self, loaded: LoadedConfig, recipe: Recipe) -> None:
        self._loaded, self._recipe = loaded, recipe
        self._rules = {label: self._rule(label) for label in recipe.terms}
        self._seeing = {label for label in recipe.terms if self._sees(label)}

    def name(self, entry: Entry) -> Name:
        """The name of an entry's line. Raises ConfigError when an image that a judge is to see cannot be read."""
        prompt, response = entry.sample
        token_ids = None if response.token_ids is None else response.token_ids.tolist()
        said = [response.text, response.reasoning_text, response.answer_text, token_ids]
        shown = [image_url(source) for source in prompt.images] if prompt.label in self._seeing else prompt.images
        asked = [prompt.messages, prompt.reference, shown]
        return Name(_digest([self._rules[prompt.label], prompt.label, asked, said]), entry.id)

    def _rule(self, label: str) -> str:
        """Terms and gates of a label, and all that its verifiers are."""
        verifiers = {name: self._verifier(name) for name in self._loaded.config.rewards.verifiers_of(label)}
        return _digest([self._recipe.terms[label], self._recipe.gates[label], verifiers])

    def _sees(self, label: str) -> bool:
        verifiers = [self._recipe.verifiers[name] for name in self._loaded.config.rewards.verifiers_of(label)]
        return any(isinstance(verifier, Judge) and verifier.section.images for verifier in verifiers)

    def _verifier(self, name: str) -> list[Any]:
        verifier, section = self._recipe.verifiers[name], self._loaded.config.rewards.verifiers[name]
        parts: list[Any] = [section.model_dump()]
        parts += [source_digest(path) for path in (section.rule, section.reward_model) if path and ":" in path]
        if isinstance(verifier, Judge):
            # As JSON: the order of verdicts says which output of a head is which, and a sorted table would lose it.
            parts += [FORM, verifier.section.model_dump_json(), verifier.model.identity]
        return parts


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_LENGTH]
