"""The section of a judge's server: which model, where it runs, and how it is reached."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from common.config.launching import LaunchSection
from common.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

_ADDRESS = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")


def _address(url: str) -> str:
    """The address itself. Raises ValueError for one that no client could use, or that holds more than a place."""
    if not _ADDRESS.fullmatch(url) or not _is_place(url):
        raise ValueError(
            "is not the address of a server. Write http://HOST:PORT or https://HOST, without a user, a password or a "
            "question mark, all of which every score would repeat; api_key_env names the variable with a server's key"
        )
    return url


def _is_place(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # As the resolver does it, which has no sentence for an empty or overlong part of a name.
        return bool(parts.hostname and parts.hostname.encode("idna")) and parts.port != 0
    except ValueError:
        return False


class ServerSection(Section):
    """A model that judges ask, whatever it runs on. All judges that name a server share it.

    engine: `vllm` and `sglang` serve it over HTTP, the same model at each of `urls`; with `in_process` it lives beside
    the policy, on the trainer's own engine and in its dtype. model: a local Hugging Face folder, a hub name, or an
    `embedded:` model; its tokenizer writes the questions. head: a safetensors file with a tensor `score.weight` [C D],
    which takes the place of the model's own head.
    Over HTTP: served_name is what the servers call it, if not `model`; revision is part of the model's name in records
    and in the cache of answers, to be changed when other weights come to stand behind one name or folder, or the same
    ones in other numbers; api_key_env: the environment variable that holds the key of servers that want one;
    concurrency: questions in flight at each url; deadline_s: seconds for one question, with all its retries; launch:
    null where somebody else starts the servers.
    In process: rows are questions computed side by side; rests_in: where the weights are while nobody asks.
    """

    engine: Literal["vllm", "sglang", "in_process"]
    model: str
    head: str | None = None
    urls: list[Annotated[str, AfterValidator(_address)]] = Field(default_factory=list)
    served_name: str | None = None
    revision: str | None = None
    api_key_env: str | None = None
    concurrency: PositiveInt = 64
    deadline_s: PositiveFloat = 120.0
    retries: NonNegativeInt = 3
    launch: LaunchSection | None = None
    rows: PositiveInt = 16
    rests_in: Literal["device", "host"] = "device"

    @model_validator(mode="after")
    def _has_place(self) -> ServerSection:
        if self.engine == "in_process" and self.urls:
            raise ValueError("a model in process has no urls. Leave them out, or set engine to vllm or sglang")
        if self.engine == "in_process" and self.launch is not None:
            raise ValueError("a model in process is opened by the trainer. Leave launch out")
        if self.engine != "in_process" and not self.urls:
            raise ValueError(f"an engine of {self.engine} is reached by HTTP. Give its urls, one for each replica")
        return self
