"""Answers of judges on disk: one file per host, for all its runs and processes.

A cache may be lost at any time and must never cost a score: what cannot be read is asked again, what cannot be written
is told once and left.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_S = 10.0  # how long to wait for another process's write
_AT_ONCE = 500  # keys of one query
_CHECK_BYTES = 8
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer BLOB NOT NULL, digest BLOB NOT NULL)"


class AnswerCache:
    """Bytes by key, in an SQLite file. A damaged file is put aside and begun anew; a damaged entry is no entry."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._guarded(self._open)

    def close(self) -> None:
        """Close the file, once nobody reads or writes it any more; whoever asks later finds nothing."""
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The answers that are there, by key."""
        with self._lock:
            return dict(self._guarded(lambda: list(self._found(keys))) or ())

    def put(self, answers: Mapping[bytes, bytes]) -> None:
        """Keep answers, in the place of those that another process has kept meanwhile."""
        rows = [(key, answer, _digest(key, answer)) for key, answer in answers.items()]
        with self._lock:
            self._guarded(lambda: self._insert(rows))

    def _open(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self._file, timeout=_PATIENCE_S, check_same_thread=False)
        _keep_journal_beside(self._connection)
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(_TABLE)

    def _found(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for start in range(0, len(keys) if self._connection else 0, _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            query = f"SELECT key, answer, digest FROM answers WHERE key IN ({','.join('?' * len(some))})"
            assert self._connection is not None
            for key, answer, digest in self._connection.execute(query, some):
                if digest == _digest(key, answer):
                    yield key, answer

    def _insert(self, rows: list[tuple[bytes, bytes, bytes]]) -> None:
        if self._connection:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """What the work gives; None when the file fails it."""
        try:
            return work()
        # Locked, full, read-only, a fault of ours: none of it is damage.
        except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
            self._give_up(str(error))
        except sqlite3.DatabaseError as error:
            self._shut()
            aside = self._file.with_name(f"{self._file.name}.damaged-{time.time_ns()}")
            print(f"cache of judges' answers: {self._file} is damaged ({error}); kept as {aside.name}", file=sys.stderr)
            try:
                self._file.replace(aside)
                for journal in ("-wal", "-shm"):  # or else they would be read into the new file
                    self._file.with_name(self._file.name + journal).unlink(missing_ok=True)
                self._open()
            except (sqlite3.Error, OSError) as again:
                self._give_up(str(again))
        return None

    def _give_up(self, reason: str) -> None:
        self._shut()
        print(f"cache of judges' answers: {self._file} cannot be used ({reason}); going on without it", file=sys.stderr)


def _keep_journal_beside(connection: sqlite3.Connection) -> None:
    """Write ahead, so that readers and a writer do not wait for each other. With this one change SQLite itself does not
    wait for another process that makes the file.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _digest(key: bytes, answer: bytes) -> bytes:
    return hashlib.sha256(key + answer).digest()[:_CHECK_BYTES]
