"""Answers on disk: shared by processes, never wrong after damage, never a reason to lose a score."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Timer

import pytest

from common.serving.answer_cache import AnswerCache
from tests.full_disk import small_disk
from tests.training import ROOT

MANY = {f"key {n}".encode(): f"answer {n}".encode() for n in range(2000)}


def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "answers.sqlite"
    with closing(AnswerCache(file)) as cache:
        assert cache.get(list(MANY)) == {}
        cache.put(MANY)
        assert cache.get([b"key 7", b"no such key"]) == {b"key 7": b"answer 7"}
    with closing(AnswerCache(file)) as cache:
        assert cache.get(list(MANY)) == MANY


def test_closing_waits_for_a_reader_and_takes_it_for_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    large = {f"key {n}".encode(): bytes(1000) for n in range(5000)}
    for _ in range(5):
        cache = AnswerCache(file)
        cache.put(large)
        with ThreadPoolExecutor(1) as beside:
            read = beside.submit(cache.get, list(large))
            cache.close()
        assert len(read.result()) in (0, len(large))  # before it was closed or after
    assert cache.get(list(large)) == {}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with closing(AnswerCache(file)) as cache:
        assert cache.get(list(large)) == large


WRITER = """
import sys
from pathlib import Path
from common.serving.answer_cache import AnswerCache
cache, name = AnswerCache(Path(sys.argv[1])), sys.argv[2]
for number in range(100):
    cache.put({f"{name} {number} {part}".encode(): b"x" * part for part in range(20)})
    assert len(cache.get([f"{name} {number} {part}".encode() for part in range(20)])) == 20
"""


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, file, name], cwd=ROOT) for name in "abc"]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    with closing(AnswerCache(file)) as cache:
        keys = [f"{name} {number} {part}".encode() for name in "abc" for number in range(100) for part in range(20)]
        assert len(cache.get(keys)) == len(keys)


def test_opening_waits_for_another_process_that_makes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        end = Timer(0.5, other.execute, ["COMMIT"])
        end.start()
        with closing(AnswerCache(file)) as cache:
            cache.put(MANY)
            assert cache.get(list(MANY)) == MANY
        end.join()


def test_a_damaged_file_is_put_aside_and_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "answers.sqlite"
    file.write_bytes(b"this was never a database, and is long enough to be taken for one" * 100)
    with closing(AnswerCache(file)) as cache:
        cache.put(MANY)
        assert cache.get(list(MANY)) == MANY
    assert "is damaged" in capsys.readouterr().err
    (aside,) = tmp_path.glob("answers.sqlite.damaged-*")
    assert aside.read_bytes().startswith(b"this was never")


def test_a_file_damaged_under_way_costs_its_answers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "answers.sqlite"
    with closing(AnswerCache(file)) as cache:
        cache.put(MANY)
    content = bytearray(file.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    file.write_bytes(content)
    with closing(AnswerCache(file)) as cache:
        assert cache.get(list(MANY)) == {}
        cache.put(MANY)
        assert cache.get(list(MANY)) == MANY
    assert "is damaged" in capsys.readouterr().err


def test_a_changed_answer_is_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    with closing(AnswerCache(file)) as cache:
        cache.put({b"a": b"0.25", b"b": b"0.5"})
    with closing(sqlite3.connect(file)) as other, other:
        other.execute("UPDATE answers SET answer = ? WHERE key = ?", (b"0.75", b"a"))
    with closing(AnswerCache(file)) as cache:
        assert cache.get([b"a", b"b"]) == {b"b": b"0.5"}
        cache.put({b"a": b"0.25"})
        assert cache.get([b"a"]) == {b"a": b"0.25"}


def test_a_full_disk_is_told_once_and_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk") as folder, closing(AnswerCache(folder / "answers.sqlite")) as cache:
        for start in range(0, 20000, 100):
            cache.put({f"key {n}".encode(): b"x" * 500 for n in range(start, start + 100)})
        assert cache.get([b"key 1"]) in ({}, {b"key 1": b"x" * 500})
    assert capsys.readouterr().err.count("going on without it") == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with closing(AnswerCache(tmp_path / "file" / "answers.sqlite")) as cache:
        cache.put(MANY)
        assert cache.get(list(MANY)) == {}
    assert "going on without it" in capsys.readouterr().err
