"""Which tensors of a model are not trained: those that a pattern of `model.frozen` matches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from common.config.section import ConfigError
from common.data.model_weights import tensor_shapes


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """The names, of a model's tensors, that a pattern matches whole."""
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def share_of_frozen(hf: Mapping[str, Any], patterns: Sequence[str]) -> str:
    """How much of the model of an accepted `config.json` the patterns hold, in words."""
    sizes = {name: prod(shape) for name, shape in tensor_shapes(hf).items()}
    frozen = frozen_names(sizes, patterns)
    part = sum(sizes[name] for name in frozen) / sum(sizes.values())
    return f"frozen: {len(frozen)} of {len(sizes)} tensors, {part:.1%} of the weights"


def refuse_unfit(hf: Mapping[str, Any], patterns: Sequence[str]) -> None:
    """Raise ConfigError, without the key, for a pattern that matches no tensor that an accepted `config.json` asks for,
    and for patterns that leave none to train.
    """
    names = list(tensor_shapes(hf))
    for pattern in patterns:
        if not frozen_names(names, [pattern]):
            raise ConfigError(
                f"{pattern!r} matches no tensor of the model, so nothing would be frozen by it. Its tensors have names "
                f"such as {names[0]} and {names[-1]}; a pattern must match a whole name, and * stands for any text."
            )
    if len(frozen_names(names, patterns)) == len(names):
        raise ConfigError("matches every tensor of the model, so nothing would be trained. Leave some out.")
