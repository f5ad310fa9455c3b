"""A value that does not fit its section -> one sentence: the key, its value, who set it, what fits, what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from common.config.launching import PASSWORD, SECRET
from common.config.merge import DEFAULT
from common.config.section import ConfigError

# What pydantic's error types mean to somebody who writes YAML.
_WORDS = {
    "int_type": "must be a whole number. Write it without quotes, point or exponent",
    "float_type": "must be a number. Write it without quotes",
    "finite_number": "must be a finite number. Choose one",
    "bool_type": "must be true or false. Write one of the two, without quotes",
    "string_type": "must be text. Put it in quotes",
    "list_type": "must be a list. Write [first, second], in quotes what holds a bracket",
    "dict_type": "must be a table. Write its keys below it, or {{key: value}}",
    "model_type": "must be a table. Write its keys below it, or {{key: value}}",
    "literal_error": "must be {expected}. Choose one of these",
    "greater_than": "must be greater than {gt}. Raise it",
    "greater_than_equal": "must be at least {ge}. Raise it",
    "less_than": "must be less than {lt}. Lower it",
    "less_than_equal": "must be at most {le}. Lower it",
    "too_short": "must have at least {min_length} entries. Add what is missing",
    "value_error": "{error}",
}
_ADDRESSES = "urls"
_SECRETIVE = ("options", "environment")  # of a launch table: words for a program
_LONGEST_VALUE = 200

Model = TypeVar("Model", bound=BaseModel)
Origin = Callable[[str], str]


def parse_table(
    model: type[Model],
    table: Mapping[str, Any],
    prefix: str,
    origin: Origin,
    later: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> Model:
    """The table that stands at the dotted key `prefix`, as its section. Raises ConfigError, one sentence a problem.

    `origin` says where a dotted key was set, or `default`; for the empty key, which files the config is made of.
    later: the sections of tables that the model leaves open, by dotted key; an unknown key may belong to one of them.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problems = [_problem(model, details, prefix, origin, later) for details in error.errors()]
    raise ConfigError("\n".join(problems))


def sentence(key: str, value: Any, origin: str, problem: str) -> str:
    """`key = value (origin): problem`; without the value where it may hold somebody's key or password."""
    is_hidden = key.partition(".")[0] == "servers" and not _fits_a_server(key.split(".")[1:], value)
    return f"{key} ({origin}): {problem}" if is_hidden else f"{key} = {shown(value)} ({origin}): {problem}"


def _fits_a_server(parts: list[str], value: Any) -> bool:
    """Whether a value of a servers table, at NAME.KEY..., has the shape of what holds no secrets there."""
    is_table = len(parts) < 2 or parts[1:] == ["launch"]
    return (isinstance(value, dict) or not is_table) and all(_is_public(part, value) for part in parts[1:])


def shown(value: Any) -> str:
    """A config value as a person would recognise it, cut when it is long, without passwords and keys."""
    value = _without_secrets(value)
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    text = PASSWORD.sub("://…@", text)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(each) if _is_public(str(key), each) else "…" for key, each in value.items()}
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value


def _is_public(key: str, value: Any) -> bool:
    """Whether what stands under a key may be repeated. An address may that holds nothing but a place."""
    if key == _ADDRESSES:
        return isinstance(value, str) and not set("@?") & set(value)
    return not value or (key not in _SECRETIVE and not SECRET.search(key))


def _unknown_key(key: str, origin: str, known: list[str], everywhere: list[str]) -> str:
    """The sentence for a key that is not there, with what may have been meant: of `known`, the keys beside it, or of
    all dotted ones.
    """
    name = key.rpartition(".")[2]
    same = [other for other in everywhere if other.rpartition(".")[2] == name]
    begun = [other for other in everywhere if other.rpartition(".")[2].startswith(f"{name}_")]
    close = same or difflib.get_close_matches(name, known, n=1) or begun or _closest(name, everywhere)
    hint = (
        f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known keys here: {', '.join(known) or 'none'}."
    )
    return f"{key} ({origin}): is not a key of the config. {hint}"


def _closest(name: str, dotted: list[str]) -> list[str]:
    """The dotted keys whose last part is most like a name, if any is."""
    close = difflib.get_close_matches(name, {key.rpartition(".")[2] for key in dotted}, n=1)
    return [key for key in dotted if key.rpartition(".")[2] in close]


@contextmanager
def blamed(key: str, value: Any, origin: Origin) -> Iterator[None]:
    """A ConfigError without a setting's name, as one with it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(sentence(key, value, origin(key), str(error))) from None


def _problem(
    model: type[BaseModel], details: Any, prefix: str, origin: Origin, later: Mapping[str, type[BaseModel]]
) -> str:
    parts = [str(part) for part in details["loc"]]
    key = ".".join([prefix, *parts] if prefix else parts)
    if details["type"] == "missing":
        remedy = f"Set it in a run file or as {key}=value." if "." in key else "Include a file that has this table."
        return f"{key} ({_origin_around(key, origin)}): is not set and has no default. {remedy}"
    if details["type"] == "extra_forbidden":
        known, is_named = _known_keys(model, parts[:-1])
        return _unknown_key(key, origin(key), known, [] if is_named else list(_dotted_keys(model, prefix, later)))
    known = _WORDS.get(details["type"])
    words = known.format(**details.get("ctx", {})) if known else details["msg"]
    return sentence(key, details["input"], origin(key), f"{words}.")


def _origin_around(key: str, origin: Origin) -> str:
    """Where the closest table around a missing key was begun."""
    table = key.rpartition(".")[0]
    found = origin(table)
    return _origin_around(table, origin) if found == DEFAULT else found


def _known_keys(model: Any, parts: list[str]) -> tuple[list[str], bool]:
    """The keys of the section at `parts`, and whether a config chose its name, or its number in a list."""
    is_named = False
    for part in parts:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = _without_null(model.model_fields[part].annotation)
        else:  # list[Section] or dict[str, Section]: the part is an index or a name
            model, is_named = get_args(model)[-1], True
    return sorted(model.model_fields), is_named


def _dotted_keys(model: type[BaseModel], prefix: str, later: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """Keys of a section and of the sections in it; not of those whose names a config chooses."""
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        inner = later.get(key, _without_null(field.annotation))
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _dotted_keys(inner, key, later)
        else:
            yield key


def _without_null(annotation: Any) -> Any:
    """`Section` for `Section | None`; anything else as it is."""
    parts = get_args(annotation)
    return parts[0] if NoneType in parts else annotation
