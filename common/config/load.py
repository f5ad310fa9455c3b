"""From run files and `key=value` words to one resolved RunConfig, every value traceable to where it was set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from common.config.checks import cross_checks
from common.config.merge import DEFAULT, Layers
from common.config.run import EngineSection, RunConfig
from common.config.section import ConfigError
from common.config.sentences import parse_table, sentence

ENGINES = ("torch", "jax")


@dataclass(frozen=True)
class LoadedConfig:
    """A resolved config, the origin (`file:line`, `command line`) of each dotted key that was set, and its own engine's
    section, parsed.
    """

    config: RunConfig
    origins: dict[str, str]
    engine: EngineSection

    def origin(self, key: str) -> str:
        """Where a dotted key was set; `default` where nobody did."""
        return self.origins.get(key, DEFAULT)

    def with_settings(self, settings: Mapping[str, Any]) -> LoadedConfig:
        """The config with other values, of the right types, at some dotted keys; they are not checked again."""
        config = self.config
        for key, value in settings.items():
            config = _replaced(config, key.split("."), value)
        table = _engine_tables(config)[config.backend.name]
        return LoadedConfig(config, self.origins, type(self.engine).model_validate(table))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config files and key=value overrides, in any order."""
    files = [word for word in words if "=" not in word or os.path.exists(word)]
    return files, [word for word in words if word not in files]


def load_words(words: Sequence[str]) -> LoadedConfig:
    """What a command line's config files and overrides, in any order, resolve to. Raises ConfigError."""
    return load_config(*split_words(words))


def load_config(paths: Sequence[str | Path], overrides: Iterable[str] = ()) -> LoadedConfig:
    """Read, merge and check run files. Raises ConfigError naming key, value, origin, what is allowed and what to do."""
    if not paths:
        raise ConfigError("no run file was given. Name one, for example configs/quickstart.yaml.")
    layers = Layers()
    for path in paths:
        layers.add_file(Path(path))
    for word in overrides:
        layers.add_word(word)

    def origin(key: str) -> str:
        return layers.origins.get(key, DEFAULT) if key else ", ".join(map(str, paths))

    # Both engines' tables are checked, whichever is chosen; their config modules are looked up by name, so that no line
    # of `common` imports a backend, and import no engine.
    sections = {f"backend.{name}": import_module(f"safework_{name}.config").SECTION for name in ENGINES}
    config = parse_table(RunConfig, layers.table, "", origin, later=sections)
    engines = {
        name: parse_table(sections[f"backend.{name}"], table, f"backend.{name}", origin)
        for name, table in _engine_tables(config).items()
    }
    # Everybody after this sees what an engine's table resolves to, its defaults too.
    dumped = {name: section.model_dump() for name, section in engines.items()}
    config = config.model_copy(update={"backend": config.backend.model_copy(update=dumped)})
    engine, resolved = engines[config.backend.name], config.model_dump()
    found = (*cross_checks(config), *engine.problems(config))
    if found:
        raise ConfigError("\n".join(sentence(key, _at(resolved, key), origin(key), problem) for key, problem in found))
    return LoadedConfig(config, layers.origins, engine)


def _engine_tables(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The table of each engine by its name."""
    return dict(zip(ENGINES, (config.backend.torch, config.backend.jax), strict=True))


def _replaced(table: Any, path: Sequence[str], value: Any) -> Any:
    """A section or a table of one with another value at a path of keys."""
    if not path:
        return value
    name, *rest = path
    if isinstance(table, dict):
        return table | {name: _replaced(table[name], rest, value)}
    return table.model_copy(update={name: _replaced(getattr(table, name), rest, value)})


def _at(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table[part]
    return table
