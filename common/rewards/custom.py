"""Verifiers of the user's own, named in a config as `module:name` and imported from where the command is run.

A rule is a function of one sample and the verifier's options:

    def shouts(sample: Sample, limit: int = 0) -> float: ...

A reward model is a class that is made once with the options and called with all samples of a step:

    class MyCustomRM:
        def __init__(self, path: str) -> None: ...
        def __call__(self, samples: Sequence[Sample]) -> list[float | None]: ...

`sample.prompt` and `sample.rollout` are those of `common/types.py`. A score is a finite number, or a Score with
evidence; None where there is none, which counts as missing.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common.config.section import ConfigError
from common.config.sentences import Origin, sentence
from common.rewards.verifier import Verifier
from common.types import Missing, Sample, Score


class Custom(Verifier):
    """Scores by something callable of the user's. What it raises stops the run as it is: it is the user's own fault to
    see.
    """

    def __init__(self, name: str, judge: Callable[[Sequence[Sample]], Sequence[Any]]) -> None:
        self.name, self._judge = name, judge

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        """One score per sample, in order. Raises ConfigError when the user's code gives another number of them."""
        found = self._judge(samples)
        if len(found) != len(samples):
            raise ConfigError(f"verifier {self.name!r} gave {len(found)} scores for {len(samples)} samples.")
        return [_checked(score) for score in found]


def custom_rule(name: str, path: str, options: Mapping[str, Any], key: str, origin: Origin) -> Verifier:
    """The verifier of a `module:function`. Raises ConfigError when there is none, or it does not take the options."""
    function = _imported(path, f"{key}.rule", origin)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        problem = f"{error}. Name a function that takes a sample and the options."
        raise ConfigError(sentence(f"{key}.rule", path, origin(f"{key}.rule"), problem)) from None
    with _options_blamed(f"{path} does not take them", "function", options, key, origin):
        signature.bind(None, **options)
    judge = partial(function, **options)
    return Custom(name, lambda samples: [judge(sample) for sample in samples])


def custom_reward_model(name: str, path: str, options: Mapping[str, Any], key: str, origin: Origin) -> Verifier:
    """The verifier of a `module:Class`. Raises ConfigError when there is none, or none can be made with the options."""
    made = _imported(path, f"{key}.reward_model", origin)
    with _options_blamed(f"{path} cannot be made with them", "class", options, key, origin):
        return Custom(name, made(**options))


@contextmanager
def _options_blamed(problem: str, code: str, options: Mapping[str, Any], key: str, origin: Origin) -> Iterator[None]:
    """A TypeError of the user's code for its options, as a ConfigError that names them."""
    try:
        yield
    except TypeError as error:
        said = f"{problem} ({error}). Correct the options or the {code}."
        raise ConfigError(sentence(f"{key}.options", dict(options), origin(f"{key}.options"), said)) from error


def source_digest(path: str) -> str:
    """SHA-256 of the file that a `module:name` in use was imported from, so that code that changed is told apart."""
    file = inspect.getsourcefile(sys.modules[path.partition(":")[0]])
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _imported(path: str, key: str, origin: Origin) -> Any:
    module, _, name = path.partition(":")
    if not module.strip(".") or module.startswith("."):
        raise ConfigError(
            sentence(key, path, origin(key), "names no module. Write module:function, without a first dot.")
        )
    # As `python -m` has it, and the installed command has not: a module beside the user's run files is found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return vars(importlib.import_module(module))[name]
    except ImportError as error:
        problem = f"cannot be imported ({error}). Name module:function of a file in this folder or of a package."
    except KeyError:
        problem = f"{module} has no {name!r}. Correct the name."
    raise ConfigError(sentence(key, path, origin(key), problem))


def _checked(score: Any) -> Score | Missing:
    if score is None or isinstance(score, Missing):
        return score or Missing("the user's code gave no score")
    number = score.value if isinstance(score, Score) else score
    if isinstance(number, str | bytes | bytearray):  # float would read it
        return Missing(f"the user's code gave {number!r}, which is no number")
    try:
        value = float(number)
    except (TypeError, ValueError, OverflowError):
        return Missing(f"the user's code gave {str(score)[:80]}, which is no number")
    if not math.isfinite(value):
        return Missing(f"the user's code gave {value}, which is not finite")
    return replace(score, value=value) if isinstance(score, Score) else Score(value, f"{value:.4g}")
