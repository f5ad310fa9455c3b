"""What every kind of cluster is told of a run: its config, its name, and the command of its processes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from common.config import ConfigError, LoadedConfig, load_words
from common.config.sentences import sentence
from common.interrupt import INTERRUPTED
from common.run_dir import not_written

# A process that SIGTERM ended before it could say so has the status that a shell gives it.
STOPPED = (INTERRUPTED, 143)


class Job(NamedTuple):
    """A run that a cluster is to do. words: config files and overrides, as `safework train` takes them."""

    words: list[str]
    loaded: LoadedConfig

    @property
    def name(self) -> str:
        """The last part of `run.dir`, as names of jobs may be: lower-case letters, digits and hyphens, 40 at most, a
        letter first.
        """
        part = re.sub(r"[^a-z0-9]+", "-", Path(self.loaded.config.run.dir).name.lower()).strip("-")
        named = f"run-{part}" if part[:1].isdigit() else part
        return named[:40].strip("-") or "safework"

    @property
    def launched(self) -> list[str]:
        """Names of the servers that have a launch table."""
        return [name for name, section in self.loaded.config.servers.items() if section.launch is not None]

    @property
    def elsewhere(self) -> list[str]:
        """A sentence for each server over HTTP that has none."""
        return [
            f"{name}: has no launch table, left to whoever starts {', '.join(section.urls)}"
            for name, section in self.loaded.config.servers.items()
            if section.launch is None and section.urls
        ]

    def refuse(self, key: str, value: Any, problem: str) -> ConfigError:
        """A value of the config that this cluster cannot use."""
        return ConfigError(sentence(key, value, self.loaded.origin(key), problem))

    def refuse_other_mesh(self, count: int, devices: str, *, may_leave_some: bool = False) -> None:
        """Raise ConfigError unless the mesh of JAX takes the devices that a cluster gives."""
        mesh = self.loaded.config.backend.jax["mesh"]
        size = prod(mesh.values())
        if size > count or (size < count and not may_leave_some):
            problem = f"is not as large as the {count} {devices} asked for. Make it so."
            raise self.refuse("backend.jax.mesh", mesh, problem)


def read_job(words: Sequence[str]) -> Job:
    """The job of config files and overrides. Raises ConfigError."""
    return Job(list(words), load_words(words))


def command(*words: str) -> list[str]:
    """The words of a `safework` command on a host that has this environment at the same path."""
    return [sys.executable, "-m", "common.cli", *words]


def shell(*words: str) -> str:
    """The same as a shell reads it."""
    return shlex.join(command(*words))


def write_file(out: Path, text: str) -> None:
    """Write a job file. Raises NotSaved."""
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise not_written(out, error, "start the same command again") from error
