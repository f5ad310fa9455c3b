"""What the tests of one session share: the programs that XLA has compiled, which most JAX processes would spend their
time on compiling again.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import pytest

_START_ENGINES = {"e2e", "jax", "launch", "parity", "torch"}
_COMPILED = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Give this process and all that it starts one cache. Called before any test file imports JAX."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the workers share that of the process that started them
    config.stash[_COMPILED] = TemporaryDirectory(prefix="safework-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[_COMPILED].name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines go first: a long one among the last would leave one core idle."""
    items.sort(key=lambda item: item.path.parent.name not in _START_ENGINES)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache."""
    if _COMPILED in config.stash:
        config.stash[_COMPILED].cleanup()
