"""The models of a config that judges ask, each opened once, when the first judge needs it."""

from __future__ import annotations

from collections.abc import Mapping

from common.config.judging import ServerSection
from common.config.section import ConfigError
from common.config.sentences import Origin, sentence
from common.serving.in_process import InProcessModel, OpenJudge
from common.serving.model import JudgeModel
from common.serving.served import ServedModel


class Servers:
    """Judge models by server name. `origin` says where a config key was set; `open_judge` opens a model in process."""

    def __init__(self, sections: Mapping[str, ServerSection], origin: Origin, open_judge: OpenJudge) -> None:
        self._sections, self._origin, self._open_judge = sections, origin, open_judge
        self._opened: dict[str, JudgeModel] = {}

    def open(self, name: str) -> JudgeModel:
        """The model of a server; several judges share one. Raises ServerError and ConfigError."""
        if name not in self._opened:
            self._opened[name] = self._open(name, self._sections[name])
        return self._opened[name]

    def _open(self, name: str, section: ServerSection) -> JudgeModel:
        key = f"servers.{name}.model"
        try:
            if section.engine == "in_process":
                return InProcessModel(section, self._open_judge)
            return ServedModel(name, section)
        except ConfigError as error:
            raise ConfigError(sentence(key, section.model, self._origin(key), str(error))) from None

    def close(self) -> None:
        """Close every connection."""
        for model in self._opened.values():
            model.close()
