"""The experiment's configuration: sections, loading with includes and overrides, checks, and where each value came from."""

from common.config.load import LoadedConfig, load_config
from common.config.run import RunConfig
from common.config.section import ConfigError

__all__ = ["ConfigError", "LoadedConfig", "RunConfig", "load_config"]
