"""Programs of several processes on this machine, for tests: how they are started, and a team without an engine."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.state_files import seal, write_part
from common.team import Team, alone, assemble, told_place
from common.trainer import PolicyTrainer
from tests.runs import DEADLINE, start

BOARD = "TEST_TEAM_BOARD"  # a folder through which processes without an engine find each other


def open_team(deadline_s: float) -> Team:
    """The team that the environment speaks of, in the words of torchrun; alone without."""
    place = told_place()
    if place is None or place.count == 1:
        return alone()
    return assemble(place, _spread, deadline_s)


def _spread(data: bytes) -> bytes:
    written = Path(os.environ[BOARD]) / "address"
    if data:
        partial = written.with_suffix(".partial")
        partial.write_bytes(data)
        partial.rename(written)
    while not written.exists():
        time.sleep(0.01)
    return written.read_bytes()


def save_together(trainer: PolicyTrainer, team: Team, folder: Path) -> None:
    """The state of a trainer in a team, complete in a folder that exists, for all to see on return."""
    write_part(trainer.snapshot(), folder, team.index, len(team.places))
    team.exchange(None, "all parts")
    if team.leads:
        seal(folder, len(team.places), {})
    team.exchange(None, "the manifest")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def started(
    count: int, module: str, *words: str | Path, hosts: int = 1, **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """`count` processes of one run, as torchrun would start them on so many hosts; killed at the end of the block."""
    port = str(free_port())
    each = count // hosts
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    processes = [
        start(module, *words, RANK=str(rank), LOCAL_RANK=str(rank % each), LOCAL_WORLD_SIZE=str(each), **shared)
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(processes: Sequence[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all of them and collect what they printed."""
    ended = [process.communicate(timeout=DEADLINE) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(processes, ended, strict=True)
    ]
