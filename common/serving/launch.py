"""The command line that starts a server, and what the server then calls its model."""

from __future__ import annotations

import os
from typing import NamedTuple

from common.config.launching import LaunchSection
from common.config.section import ConfigError
from common.config.servers import ServerSection
from common.data.model_folder import engine_path


class _Words(NamedTuple):
    """An engine's module, and its words for what each section has a key for; `head`: a model with a head to be read."""

    module: str
    model: str
    tensor_parallel: str
    memory_fraction: str
    head: tuple[str, ...]


_WORDS = {
    "vllm": _Words(
        "vllm.entrypoints.openai.api_server",
        "--model",
        "--tensor-parallel-size",
        "--gpu-memory-utilization",
        ("--runner", "pooling"),
    ),
    "sglang": _Words("sglang.launch_server", "--model-path", "--tp-size", "--mem-fraction-static", ("--is-embedding",)),
}


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class Loaded(NamedTuple):
    """What an engine is to load: a folder or hub name, whether it ends in a scalar or class head, and its name then."""

    path: str
    has_head: bool
    served_name: str


def served_name(section: ServerSection) -> str:
    """What the servers of a section call their model. SGLang tells what it loaded, vLLM the name that it was given.

    Raises ConfigError, without the setting's name, when there is no such model.
    """
    if section.served_name is not None:
        return section.served_name
    return engine_path(section.model, section.head) if section.engine == "sglang" else section.model


def command(section: ServerSection, launch: LaunchSection, model: Loaded, address: Address) -> list[str]:
    """The words of a server's command line, the user's own options last.

    Raises ConfigError, without the setting's name, for an option that would change what the other keys say.
    """
    words = _WORDS[section.engine]
    line = [os.path.expanduser(launch.python), "-m", words.module]
    line += [words.model, model.path, "--served-model-name", model.served_name]
    line += ["--host", address.host, "--port", str(address.port), words.tensor_parallel, str(launch.tensor_parallel)]
    if launch.memory_fraction is not None:
        line += [words.memory_fraction, str(launch.memory_fraction)]
    if model.has_head:
        line += words.head
    for option in launch.options:
        flag = option.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag in (*line, words.memory_fraction):
            raise ConfigError(f"{flag} follows from the server's other keys. Leave it out, and set those.")
    return line + launch.options
