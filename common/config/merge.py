"""Run files and `key=value` words -> one table, and the place that set each of its keys.

A run file names what it includes; tables merge, lists replace, later wins: included files in order, then the file
itself, then further files, then overrides. A label's terms, a judge's prompts and its verdicts replace as a list
does: what a run file names is all that counts, and a term of an earlier recipe cannot add to a total unseen. So does a
verifier that becomes another, and a read-out of another type: what the first read is none of theirs.

YAML 1.2 rules: `1e-6` is a number; `no` and `2026-01-01` are strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from common.config.section import ConfigError

COMMAND_LINE = "command line"
_WHOLE = re.compile(r"rewards\.recipe\.[^.]+|rewards\.judges\.[^.]+\.(prompts|read_out\.verdicts)")
_WHOLE_WITH = (  # tables that replace where one of these keys changes
    (re.compile(r"rewards\.verifiers\.[^.]+"), ("rule", "judge", "reward_model")),
    (re.compile(r"rewards\.judges\.[^.]+\.read_out"), ("type",)),
)
DEFAULT = "default"


class Layers:
    """Config tables laid over each other. `origins` has `file:line` or `command line` for each dotted key that was set;
    an entry of a list counts as a key (`data.train.0.path`).
    """

    def __init__(self) -> None:
        self.table: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def add_file(self, path: Path, includers: tuple[Path, ...] = ()) -> None:
        """Lay a run file on top of what is there, what it includes first. Raises ConfigError."""
        if path.resolve() in [file.resolve() for file in includers]:
            raise ConfigError(
                f"include = {path.name!r} ({includers[-1]}): {path} then includes itself. Remove one of the includes."
            )
        content = _read_run_file(path, includers)
        for included in content.pop("include", []):
            self.add_file(path.parent / included, (*includers, path))
        self._lay(self.table, content, "", path)

    def add_word(self, word: str) -> None:
        """Lay one `section.key=value` on top, the value read as YAML. Raises ConfigError."""
        key, equals, text = word.partition("=")
        *parents, last = key.split(".")
        if not equals or not all([*parents, last]):
            raise ConfigError(
                f"{word!r} ({COMMAND_LINE}): is neither a config file nor key=value. Write section.key=value."
            )
        target, name = self.table, ""
        for parent in parents:
            name += parent
            if parent not in target:
                target[parent] = {}
                self.origins[name] = COMMAND_LINE
            if not isinstance(target[parent], dict):
                raise ConfigError(
                    f"{word!r} ({COMMAND_LINE}): {name} is no table, so {last!r} is no key. Set it whole: {name}=..."
                )
            target, name = target[parent], f"{name}."
        self._lay(target, CommentedMap({last: _read_word(text)}), name, None)

    def _lay(
        self, target: dict[str, Any] | list[Any], new: CommentedMap | CommentedSeq, prefix: str, path: Path | None
    ) -> None:
        for key, value in _items(new):
            origin = f"{path}:{_line(new, key)}" if path else COMMAND_LINE
            if isinstance(target, dict):
                _require_plain_key(key, origin)
            name = f"{prefix}{key}"
            before = target.get(key) if isinstance(target, dict) else None
            if not isinstance(before, dict) or not isinstance(value, CommentedMap) or _is_whole(name, before, value):
                self._forget_below(name)
                target[key] = _empty_or_plain(value)
            self.origins[name] = origin
            if isinstance(value, CommentedMap | CommentedSeq):
                self._lay(target[key], value, f"{name}.", path)

    def _forget_below(self, name: str) -> None:
        for key in [key for key in self.origins if key.startswith(f"{name}.")]:
            del self.origins[key]


def _is_whole(name: str, before: dict[str, Any], table: CommentedMap) -> bool:
    """Whether a table takes the place of the one before it instead of being laid over it."""
    if _WHOLE.fullmatch(name):
        return True
    kinds = next((kinds for place, kinds in _WHOLE_WITH if place.fullmatch(name)), ())
    return any(kind in table and table[kind] != before.get(kind) for kind in kinds)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Constructor = _Constructor
    return yaml


class _Constructor(RoundTripConstructor):
    """Reads a date as the string that it is in YAML 1.2."""

    def construct_yaml_timestamp(self, node: Any, values: Any = None) -> Any:
        return self.construct_scalar(node)


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", _Constructor.construct_yaml_timestamp)


def _read_run_file(path: Path, includers: tuple[Path, ...]) -> CommentedMap:
    where = f"{path}, included by {includers[-1]}" if includers else str(path)
    try:
        content = _yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such config file. Give the path of a YAML run file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read ({error}). Give the path of a YAML run file.") from None
    except YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}. Correct the file there.") from None
    if not isinstance(content, CommentedMap):
        holds = "nothing" if content is None else f"a {type(_plain(content)).__name__}"
        raise ConfigError(f"{where}: holds {holds}, not a table of keys. Write `section:` tables.")
    include = content.get("include", [])
    if not isinstance(include, list) or not all(isinstance(entry, str) and "\0" not in entry for entry in include):
        raise ConfigError(
            f"include = {_plain(include)!r} ({path}:{_line(content, 'include')}): must be a list of file paths. "
            "Write include: [file.yaml, ...]."
        )
    return content


def _yaml_problem(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f":{error.problem_mark.line + 1}: is not valid YAML: {' '.join(str(error.problem).split())}"
    return f": is not valid YAML: {' '.join(str(error).split())}"


def _read_word(text: str) -> Any:
    try:
        return _yaml().load(text)
    except YAMLError:
        return text


def _items(node: CommentedMap | CommentedSeq) -> Iterator[tuple[Any, Any]]:
    return iter(node.items()) if isinstance(node, CommentedMap) else enumerate(node)


def _line(node: CommentedMap | CommentedSeq, key: Any) -> int:
    # A key that came by a merge (`<<: *other`) has no line of its own; the table's first line stands for it.
    lines = node.lc.data or {}
    return (lines[key][0] if key in lines else node.lc.line) + 1


def _require_plain_key(key: Any, origin: str) -> None:
    if not isinstance(key, str):
        raise ConfigError(f"key {key!r} ({origin}): is no text. Put it in quotes.")
    if "." in key or not key:
        raise ConfigError(f"key {key!r} ({origin}): is empty or holds a dot, which joins keys. Choose another name.")


def _empty_or_plain(value: Any) -> Any:
    """An empty place for a table or list, of the right size; any other value as it is."""
    if isinstance(value, CommentedMap):
        return {}
    return [None] * len(value) if isinstance(value, CommentedSeq) else _plain(value)


def _plain(value: Any) -> Any:
    """Python's own types out of ruamel's round-trip ones, which remember how a value was written."""
    if isinstance(value, CommentedMap):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, CommentedSeq):
        return [_plain(entry) for entry in value]
    if isinstance(value, ScalarBoolean):
        return bool(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
