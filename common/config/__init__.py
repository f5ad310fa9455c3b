"""The experiment's configuration: sections, includes and overrides, checks, and the origin of each value."""

from common.config.load import LoadedConfig, load_config, load_words
from common.config.method import LossConfig
from common.config.run import RunConfig
from common.config.section import ConfigError

__all__ = ["ConfigError", "LoadedConfig", "LossConfig", "RunConfig", "load_config", "load_words"]
