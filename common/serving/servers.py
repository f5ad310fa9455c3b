"""The servers of a config, each opened once, when the first judge asks for it."""

from __future__ import annotations

from collections.abc import Mapping

from common.config.judging import ServerSection
from common.config.section import ConfigError
from common.config.sentences import Origin, sentence
from common.serving.served import ServedModel


class Servers:
    """Judge models by server name. `origin` says where a config key was set."""

    def __init__(self, sections: Mapping[str, ServerSection], origin: Origin) -> None:
        self._sections, self._origin = sections, origin
        self._opened: dict[str, ServedModel] = {}

    def open(self, name: str) -> ServedModel:
        """The model of a server; several judges share one. Raises ServerError and ConfigError."""
        if name not in self._opened:
            section, key = self._sections[name], f"servers.{name}.model"
            try:
                self._opened[name] = ServedModel(name, section)
            except ConfigError as error:
                raise ConfigError(sentence(key, section.model, self._origin(key), str(error))) from None
        return self._opened[name]

    def close(self) -> None:
        """Close every connection."""
        for model in self._opened.values():
            model.close()
