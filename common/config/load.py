"""From run files and `key=value` words to one resolved RunConfig, every value traceable to where it was set.

A run file names what it includes; tables merge, lists replace, later wins: included files in order, then the file
itself, then further files, then overrides. YAML 1.2 rules: `1e-6` is a number, `no` is a string.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from common.config.checks import cross_checks
from common.config.run import RunConfig
from common.config.section import ConfigError, Section

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A resolved config, the origin (`file:line`, `command line`) of each dotted key that was set, and its own engine's
    section, parsed.
    """

    config: RunConfig
    origins: dict[str, str]
    engine: Section

    def origin(self, key: str) -> str:
        """Where a dotted key, or the closest table around it, was set; `default` where nobody did."""
        return _origin(self.origins, key)


def load_config(paths: Sequence[str | Path], overrides: Iterable[str] = ()) -> LoadedConfig:
    """Read, merge and check run files. Raises ConfigError naming file, key, value, what is allowed and what to do."""
    table: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in paths:
        _merge_file(table, origins, Path(path), seen=())
    for word in overrides:
        _override(table, origins, word)
    try:
        config = RunConfig.model_validate(table)
        engines = {name: _engine_section(name, getattr(config.backend, name)) for name in ("torch", "jax")}
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, table, origins))) from None
    problems = [
        f"{key} = {_at(config.model_dump(), key)!r} ({_origin(origins, key)}): {sentence}"
        for key, sentence in cross_checks(config)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return LoadedConfig(config, origins, engines[config.backend.name])


def _engine_section(name: str, table: dict[str, Any]) -> Section:
    # Looked up by name, so that no line of `common` imports a backend; these config modules import no engine.
    return import_module(f"safework_{name}.config").parse(table)


def _merge_file(table: dict[str, Any], origins: dict[str, str], path: Path, seen: tuple[Path, ...]) -> None:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: includes itself by way of {seen[-1]}. Remove one of the two includes.")
    content = _read_yaml(path)
    for included in content.pop("include", []):
        _merge_file(table, origins, path.parent / included, (*seen, path.resolve()))
    _merge_table(table, origins, content, path, "")


def _read_yaml(path: Path) -> CommentedMap:
    try:
        content = YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file. Give the path of a YAML run file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give the path of a YAML run file.") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, CommentedMap):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a table of keys. Write `section:` tables.")
    include = content.get("include", [])
    if not isinstance(include, list) or not all(isinstance(entry, str) for entry in include):
        raise ConfigError(f"include = {_plain(include)!r} ({path}): must be a list of file paths.")
    return content


def _merge_table(table: dict[str, Any], origins: dict[str, str], new: CommentedMap, path: Path, prefix: str) -> None:
    for key, value in new.items():
        name = f"{prefix}{key}"
        if isinstance(value, CommentedMap):
            if not isinstance(table.get(key), dict):
                table[key] = {}
            origins[name] = f"{path}:{new.lc.key(key)[0] + 1}"
            _merge_table(table[key], origins, value, path, f"{name}.")
        else:
            table[key] = _plain(value)
            origins[name] = f"{path}:{new.lc.key(key)[0] + 1}"


def _plain(value: Any) -> Any:
    """Python's own types out of ruamel's round-trip ones, which remember how a number was written."""
    if isinstance(value, (dict, CommentedMap)):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, CommentedSeq)):
        return [_plain(entry) for entry in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(table: dict[str, Any], origins: dict[str, str], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{word!r} ({COMMAND_LINE}): is neither a config file nor key=value. Write section.key=value."
        )
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        value = text
    *parents, last = key.split(".")
    place = table
    for parent in parents:
        if not isinstance(place.setdefault(parent, {}), dict):
            raise ConfigError(f"{key} ({COMMAND_LINE}): {parent} is a value, not a table; it has no key {last!r}.")
        place = place[parent]
    place[last] = value
    origins[key] = COMMAND_LINE


def _origin(origins: dict[str, str], key: str) -> str:
    if key in origins:
        return origins[key]
    parent, dot, _ = key.rpartition(".")
    # A default inside a table that a file opens is still a default: only lists and values pass their origin down.
    return _origin(origins, parent) if dot and parent not in _tables(origins) else DEFAULT


def _tables(origins: dict[str, str]) -> set[str]:
    return {key.rpartition(".")[0] for key in origins}


def _at(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table[int(part)] if isinstance(table, list) else table[part]
    return table


def _sentences(error: ValidationError, table: dict[str, Any], origins: dict[str, str]) -> list[str]:
    return [_sentence(details, table, origins) for details in error.errors()]


def _sentence(details: Any, table: dict[str, Any], origins: dict[str, str]) -> str:
    parts = [str(part) for part in details["loc"]]
    key = ".".join(parts)
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing":
        return f"{key}: is not set and has no default. Set it in a run file or as {key}=value."
    if details["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known keys here: {', '.join(known)}."
        return f"{key} ({_origin(origins, key)}): is not a key of the config. {hint}"
    return f"{key} = {details['input']!r} ({_origin(origins, key)}): {message[0].lower()}{message[1:]}."


def _known_keys(parts: list[str]) -> list[str]:
    model: Any = RunConfig
    for part in parts:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            annotations = get_args(model)
            model = annotations[-1] if annotations else None
        else:
            model = field.annotation
    if isinstance(model, type) and issubclass(model, BaseModel):
        return sorted(model.model_fields)
    return []
