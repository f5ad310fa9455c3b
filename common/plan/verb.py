"""The verb plan: its options, and what is printed of what an engine found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from common.config import ConfigError, LoadedConfig
from common.plan.report import PARTS, Plan, report
from common.plan.target import Target, read_target

OpenPlan = Callable[[LoadedConfig, Target, tuple[str, ...]], Plan]


def add_options(parser: argparse.ArgumentParser, slices: Callable[[str], int]) -> None:
    """The verb's options; `slices` reads how many there are."""
    parser.add_argument("--target", required=True, help="v5p:4x4x8, v5e:16x16, a100-80:64, h100:8, h200:8, ...")
    parser.add_argument("--slices", type=slices, default=1, help="TPU pods of that shape, one a replica or more")
    words = f"some of {', '.join(PARTS)}; default: all"
    parser.add_argument("--only", metavar="PROGRAM", nargs="+", action="extend", default=[], help=words)


def refuse_unknown(parts: Sequence[str]) -> None:
    """Raise ConfigError for a program that is none of PARTS."""
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"--only {part}: is no program of a plan. Choose among {', '.join(PARTS)}.")


def target_of(loaded: LoadedConfig, name: str, slices: int) -> Target:
    """The target of that name. Raises ConfigError where there is none or the config's engine does not plan for it."""
    target, engine = read_target(name, slices), loaded.config.backend.name
    if target.chip.engine != engine:
        raise ConfigError(
            f"--target {target.name}: is planned for by backend.name = {target.chip.engine}, not {engine}. "
            "Set backend.name, or choose another target."
        )
    return target


def plan(open_plan: OpenPlan | None, loaded: LoadedConfig, name: str, slices: int, parts: tuple[str, ...]) -> int:
    """Print what a config needs of the target of that name; the exit status is 0 where it fits. Raises ConfigError."""
    assert open_plan is not None, "both engines plan"
    found = open_plan(loaded, target_of(loaded, name, slices), parts or PARTS)
    # As wide as its tables, where there is no terminal to say how wide.
    Console(width=None if sys.stdout.isatty() else 140).print(report(found))
    return 0 if found.fits else 1
