"""Many short processes from one that has imported the libraries of both engines, which most of their time would go to.

The warm process forgets every module of this repository before it forks, so that each fork imports those of its own
copy of the tree.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = ("common", "safework_torch", "safework_jax", "tests")
_PROGRAM = "tests.parity.inside_copy"


class Warm:
    """The side of whoever asks for forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, tree: Path, words: list[str], deadline_s: int) -> subprocess.CompletedProcess[str]:
        """Run `tests.parity.inside_copy` from the root of a copy of the tree; both outputs come as `stdout`.

        After `deadline_s` seconds it is killed by SIGALRM.
        """
        output = tree / "output.txt"
        order = {"tree": str(tree), "words": words, "output": str(output), "deadline_s": deadline_s}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, status, output.read_text(), "")


@contextmanager
def warmed(**environment: str) -> Iterator[Warm]:
    """A warm process with these variables set, for as long as the block lasts."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.parity.warm"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Warm(process)
        process.communicate()


def serve() -> None:
    """Import, forget, and fork for each line of standard input; answer with the exit status."""
    for module in ("safework_torch.main", "safework_jax.main", _PROGRAM):
        import_module(module)
    for name in [name for name in sys.modules if name.partition(".")[0] in TREES]:
        del sys.modules[name]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.exit(_run_fork(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run_fork(tree: str, words: list[str], output: str, deadline_s: int) -> int:
    signal.alarm(deadline_s)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(tree)
    sys.path[0] = tree  # where `-m` put the root of the repository
    return int(import_module(_PROGRAM).main(*words))


if __name__ == "__main__":
    serve()
