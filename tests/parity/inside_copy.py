"""What runs inside a copy of the source tree, as `python -m tests.parity.inside_copy FILE WHAT ...` from its root:

tests NODE                          pytest on that node
measure ENGINE WORDS                the engine's side of the ladder, as its `measure` verb

FILE must be imported from the copy, and from nowhere else: an editable install of the original is not to win.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

WRONG_MODULE = 70


def main(file: str, what: str, *words: str) -> int:
    """The exit status of pytest or of the engine's program."""
    origin = import_module(file.removesuffix(".py").replace("/", ".")).__file__
    if origin is None or not Path(origin).samefile(Path.cwd() / file):
        print(f"{file} was imported from {origin}", file=sys.stderr)
        return WRONG_MODULE
    if what == "tests":
        return pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", *words])
    engine, *rest = words
    program = import_module(f"safework_{engine}.main")
    from common.engine_main import Engine, run_verb

    return run_verb(Engine(program.open_team, program.open_trainer, program.open_judge), ["measure", *rest])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
