"""The `safework` command: checks the config, then hands over to the engine's own program."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from common.config import ConfigError, load_config
from common.engine_main import split_arguments

CONFIG_HELP = "run files (YAML) and key=value overrides, later ones win"


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `safework`; returns the exit status."""
    arguments = _parser().parse_args(words)
    try:
        return arguments.run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safework", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train the policy of a config; resumes an unfinished run")
    train.add_argument("config", nargs="+", help=CONFIG_HELP)
    train.set_defaults(run=_train)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    loaded = load_config(*split_arguments(arguments.config))
    module = f"safework_{loaded.config.backend.name}.main"
    # The engine's program takes this process over, so that signals and exit status are its own.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, "train", *arguments.config])


if __name__ == "__main__":
    sys.exit(main())
