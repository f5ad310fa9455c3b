"""The engines' own programs, started: the rest of the package imports no engine and works without any installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from common.config import ConfigError, load_words
from common.config.sentences import sentence

# What an engine cannot do without; the extra of its name brings them.
_PACKAGES = {"torch": ("torch",), "jax": ("jax", "optax")}


def require_engine(name: str, origin: str) -> None:
    """Raise ConfigError where what an engine needs is not installed; `origin` says where it was chosen."""
    if missing := _missing(name):
        problem = (
            f"{' and '.join(missing)} cannot be imported by {sys.executable}. From the folder of SafeWork: "
            f"{sys.executable} -m pip install -e '.[{name}]'"
        )
        raise ConfigError(sentence("backend.name", name, origin, problem))


def is_installed(name: str) -> bool:
    """Whether an engine could run here."""
    return not _missing(name)


def _missing(name: str) -> list[str]:
    return [package for package in _PACKAGES[name] if find_spec(package) is None]


def hand_over(config: Sequence[str], *verb: str) -> NoReturn:
    """Let the program of a config's engine take this process over, so that signals and exit status are its own.

    config: files and overrides. verb: its words before them. Raises ConfigError.
    """
    loaded = load_words(config)
    name = loaded.config.backend.name
    require_engine(name, loaded.origin("backend.name"))
    sys.stdout.flush()
    os.execv(sys.executable, _command(name, *verb, *config))


def run_engine(name: str, *words: str) -> None:
    """An engine's program in a process of its own, with backend.name set to it, so that it takes a config of either.

    Raises ConfigError where it fails.
    """
    if subprocess.run(_command(name, *words, f"backend.name={name}"), check=False).returncode:
        raise ConfigError(f"the {name} engine could not do its part; its own message stands above.")


def _command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"safework_{name}.main", *words]
