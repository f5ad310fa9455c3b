"""Ray clusters of two raylets on this machine, and `safework launch` on them as a process of its own."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from tests.runs import DEADLINE, ENVIRONMENT, start
from tests.training import ROOT


@contextmanager
def ray_cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with two CPUs each and no GPU; nothing of it outlives the block."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(ROOT), before.get("PYTHONPATH", "")]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


class Launched:
    """`safework launch --on ray`, what it has printed, and the processes that its actors started."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self._out = process, list[str]()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._out.extend(self.process.stdout)

    @property
    def out(self) -> str:
        """What it has printed."""
        return "".join(self._out)

    def until(self, condition: Callable[[], object]) -> None:
        """Poll until the condition holds."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.out
            time.sleep(0.05)

    def ended(self) -> tuple[int, str]:
        """Its exit status and its errors, when it has ended."""
        assert self.process.stderr is not None
        error = self.process.stderr.read()
        self._reader.join()
        return self.process.wait(DEADLINE), error


@contextmanager
def launched(address: str, run_file: Path, *words: str) -> Iterator[Launched]:
    """The command on a run of two trainer processes; killed at the end of the block."""
    options = ("--on", "ray", "--address", address, "--processes", "2")
    process = start("common.cli", "launch", run_file, *options, *words, RAY_USAGE_STATS_ENABLED="0")
    try:
        yield Launched(process)
    finally:
        process.kill()
        process.wait()


def programs(module: str, *given: str | Path, **variables: str) -> list[psutil.Process]:
    """Processes that run a module with these words and with these variables in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if words[1:3] == ["-m", module] and variables.items() <= environment.items() and {*map(str, given)} <= {*words}:
            found.append(process)
    return found
