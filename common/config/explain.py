"""A resolved config as YAML, each value with the place that set it; and what two configs disagree on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from common.config.load import LoadedConfig
from common.config.run import RunConfig

# What a resumed run may change: none of it alters what an earlier step computed.
MAY_CHANGE = ("run.dir", "run.steps", "checkpoint.", "evaluation.", "metrics.")


def explain(loaded: LoadedConfig) -> str:
    """The resolved config as a YAML document that loads again, each value followed by `# origin`."""
    document = CommentedMap(loaded.config.model_dump())
    _annotate(document, loaded, "")
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000
    yaml.dump(document, text)
    return text.getvalue()


def _annotate(table: CommentedMap, loaded: LoadedConfig, prefix: str) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            table[key] = CommentedMap(value)
            _annotate(table[key], loaded, f"{prefix}{key}.")
        elif not isinstance(value, list) or not value:
            table.yaml_add_eol_comment(loaded.origin(f"{prefix}{key}"), key)


def forbidden_changes(saved: RunConfig, now: RunConfig) -> list[str]:
    """One line for each key that differs and must not, of a run that is being resumed."""
    before, after = dict(_leaves(saved.model_dump(), "")), dict(_leaves(now.model_dump(), ""))
    return [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def _leaves(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
