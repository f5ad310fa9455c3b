"""Processes that work together, as real processes: what they exchange, and that none outlives the end of another."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from ast import literal_eval
from pathlib import Path

import pytest

from common.team import Place, ProcessesParted, Team, alone, assemble, told_place
from tests.teams import BOARD, finished, started

MEMBER = "tests.team_member"


def test_alone_there_is_nobody_to_wait_for() -> None:
    with alone() as team:
        assert team.leads and team.exchange("mine", "nothing") == ["mine"]
        assert team.shared([1, 2, 3], lambda items: [item * 2 for item in items], "nothing") == [2, 4, 6]


def test_everyone_gets_what_everyone_said(tmp_path: Path) -> None:
    with started(3, MEMBER, "60", "meet", "large", "meet", **{BOARD: str(tmp_path)}) as processes:
        done = finished(processes)
    assert [each.returncode for each in done] == [0, 0, 0], done
    for each in done:
        first, sizes, last = map(literal_eval, each.stdout.splitlines())
        assert first == last == [0, 10, 20]
        assert sizes == [20_000_000, 20_000_001, 20_000_002]


def test_one_process_of_each_host_works_for_all(tmp_path: Path) -> None:
    with started(4, MEMBER, "60", "share", hosts=2, **{BOARD: str(tmp_path)}) as processes:
        done = finished(processes)
    for each in done:
        assert literal_eval(each.stdout) == [(2 * (item % 2), item) for item in range(7)]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_and_ends_the_others(tmp_path: Path, lost: int) -> None:
    """Also one that waits for nothing and nobody, as in a collective of an engine."""
    words = ("60", "meet", f"{lost}:kill", "2:sleep", "meet")
    begun = time.monotonic()
    with started(3, MEMBER, *words, **{BOARD: str(tmp_path)}) as processes:
        done = finished(processes)
    assert time.monotonic() - begun < 30
    assert done[lost].returncode == -9
    for index in {0, 1, 2} - {lost}:
        assert done[index].returncode == 1
        assert f"error: process {lost} of 3 (" in done[index].stderr
        assert "ended without a word" in done[index].stderr


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_told_to_the_others(tmp_path: Path, failing: int) -> None:
    words = ("60", "meet", f"{failing}:fail", "2:sleep", "meet")
    with started(3, MEMBER, *words, **{BOARD: str(tmp_path)}) as processes:
        done = finished(processes)
    assert [each.returncode for each in done] == [1, 1, 1]
    assert done[failing].stderr == "own error: the disk is full\n"
    for index in {0, 1, 2} - {failing}:
        assert done[index].stderr.startswith(f"error: process {failing} of 3 (")
        assert done[index].stderr.endswith(" stopped: the disk is full\n")


@pytest.mark.parametrize("late", [0, 1])
def test_who_does_not_come_is_named(tmp_path: Path, late: int) -> None:
    with started(3, MEMBER, "2", "meet", f"{late}:sleep", "meet", **{BOARD: str(tmp_path)}) as processes:
        done = finished([process for index, process in enumerate(processes) if index != late])
    for each in done:
        assert each.returncode == 1
        assert f"process {late} of 3 (" in each.stderr
        assert "not there for the meeting after" in each.stderr and "run.deadline_s = 2" in each.stderr


def test_a_signal_in_one_ends_all_as_interrupted(tmp_path: Path) -> None:
    words = ("60", "meet", "1:signal", "sleep")
    with started(3, MEMBER, *words, **{BOARD: str(tmp_path)}) as processes:
        done = finished(processes)
    assert [each.returncode for each in done] == [130, 130, 130]
    assert done[0].stderr.startswith("error: process 1 of 3 (") and done[0].stderr.endswith(" by a signal.\n")


def test_strangers_keep_nobody_waiting() -> None:
    """One who connects first and says nothing, and one who says the wrong thing, before the other process comes."""
    told: list[bytes] = []
    strangers: list[socket.socket] = []
    teams: dict[int, Team] = {}

    def spread(data: bytes) -> bytes:
        if data:
            told.append(data)
            hosts, port, _ = pickle.loads(data)
            for words in (b"", b"GET / HTTP/1.1\r\n\r\n"):
                strangers.append(socket.create_connection((hosts[-1], port)))
                strangers[-1].sendall(words)
            joining.start()
        return told[0]

    def join() -> None:
        teams[1] = assemble(Place(1, 2, 1, "here"), spread, 10.0)

    joining = threading.Thread(target=join)
    begun = time.monotonic()
    teams[0] = assemble(Place(0, 2, 0, socket.gethostname()), spread, 10.0)
    joining.join()
    assert time.monotonic() - begun < 5
    assert [place.index for place in teams[0].places] == [0, 1]
    for index in (1, 0):
        teams[index].__exit__(None, None, None)
    for each in strangers:
        each.close()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "but LOCAL_RANK is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but RANK is 'one'"),
    ],
)
def test_half_a_place_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert told_place() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessesParted, match=sentence):
        told_place()
