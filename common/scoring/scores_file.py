"""The file of scores, a line a record, appended chunk by chunk: what is in it is not asked again.

A line has its record's id and a key, which stands for all that its scores come from: prompt, response, reference,
images, and the verifiers of its label with the models that they ask.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.config import ConfigError
from common.disk import NotSaved, not_locked, not_written, sync
from common.types import Asked, Missing, Score

_BEGIN = re.compile(rb'\{"key": "[0-9a-f]{16}", "id": "')  # of each line, and of what was torn off


class Name(NamedTuple):
    """What a line is found by. Two records with the same one are the same in all that matters."""

    key: str
    id: str


@dataclass(frozen=True)
class Line:
    """What came of scoring one record; `total` is None where a score is missing."""

    name: Name
    label: str
    total: float | None
    results: dict[str, Score | Missing]

    @property
    def missing(self) -> dict[str, Missing]:
        """The verifiers that could not judge."""
        return {name: result for name, result in self.results.items() if isinstance(result, Missing)}

    def to_json(self) -> bytes:
        """The line as it stands in the file."""
        present = {name: result for name, result in self.results.items() if isinstance(result, Score)}
        asked = {name: result.asked for name, result in self.results.items() if result.asked is not None}
        record = {
            "key": self.name.key,
            "id": self.name.id,
            "label": self.label,
            "total": self.total,
            "scores": {name: score.value for name, score in present.items()},
            "verdicts": {name: score.verdict for name, score in present.items() if score.verdict is not None},
            "evidence": {name: score.evidence for name, score in present.items()},
            "disagreement": {
                name: score.disagreement for name, score in present.items() if score.disagreement is not None
            },
            "missing": {name: result.reason for name, result in self.missing.items()},
            "unparsable": [name for name, result in self.missing.items() if result.unparsable],
            "judged_by": {name: each.model for name, each in asked.items()},
            "asked": {name: _timing(each) for name, each in asked.items()},
        }
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> Line:
        """The line that `to_json` wrote. Raises ValueError, KeyError, TypeError or AttributeError for another."""
        record = json.loads(line)
        asked = {name: Asked(model, **record["asked"][name]) for name, model in record["judged_by"].items()}
        results: dict[str, Score | Missing] = {
            name: Score(
                value=float(value),
                evidence=record["evidence"][name],
                verdict=record["verdicts"].get(name),
                asked=asked.get(name),
                disagreement=record["disagreement"].get(name),
            )
            for name, value in record["scores"].items()
        }
        for name, reason in record["missing"].items():
            results[name] = Missing(str(reason), name in record["unparsable"], asked.get(name))
        return cls(Name(str(record["key"]), str(record["id"])), str(record["label"]), record["total"], results)


def _timing(asked: Asked) -> dict[str, float | bool]:
    return {"queue_s": asked.queue_s, "latency_s": asked.latency_s, "cached": asked.cached}


class ScoresFile:
    """One file of scores, for one process at a time. `close` gives it back.

    Raises ConfigError, and changes nothing, when the file is not one of scores or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._opened(path)
        self._count = 0

    def _opened(self, path: Path) -> int:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise not_written(path, error, "start the same command again") from error
        try:
            self._claim(file, path)
        except (ConfigError, NotSaved):
            os.close(file)
            raise
        return file

    def _claim(self, file: int, path: Path) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ConfigError(f"--out {path}: is no file that can be gone on with. Give the path of one.")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process that resumed in between has put a new file there, and let go of this one.
            if not os.path.samestat(os.fstat(file), os.stat(path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise ConfigError(
                f"--out {path}: another process writes its scores there. Wait for it, or give another path."
            ) from None
        except OSError as error:
            raise not_locked(path, error) from error

    def close(self) -> None:
        """Let another process have the file."""
        os.close(self._file)

    def resume(self, names: Sequence[Name]) -> list[Line]:
        """The lines of these records that have all their scores. From then on the file holds them alone: a line that
        a killed process tore off is dropped unless only its end is missing, and records with a missing score are asked
        again.

        Raises ConfigError when it holds anything else.
        """
        *whole, last = self._path.read_bytes().split(b"\n")
        lines = [self._line(number, text) for number, text in enumerate(whole, start=1)]
        lines += self._last_line(last, len(whole) + 1)
        left = Counter(names)
        for number, line in enumerate(lines, start=1):
            left[line.name] -= 1
            if left[line.name] < 0:
                raise self._foreign(number, f"({line.name.id!r}) comes of other records or verifiers than those of now")
        kept = [line for line in lines if not line.missing]
        if last or len(kept) < len(lines):
            self._replace(kept)
        self._count = len(kept)
        return kept

    def _line(self, number: int, text: bytes) -> Line:
        try:
            return Line.from_json(text)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._foreign(number, "is damaged, or none that this command writes") from None

    def _last_line(self, text: bytes, number: int) -> list[Line]:
        """The line that lacks only its end, or none where more of one was torn off."""
        try:
            return [Line.from_json(text)]
        except (ValueError, KeyError, TypeError, AttributeError):
            # A file with less in it than a line's beginning may be anybody's.
            if text and not _BEGIN.match(text) and (number == 1 or not _is_beginning(text)):
                raise self._foreign(number, "is none that this command writes") from None
        return []

    def _foreign(self, number: int, problem: str) -> ConfigError:
        return ConfigError(
            f"--out {self._path}: its line {number} {problem}. Give --out another path, or move the file away."
        )

    def _replace(self, lines: Iterable[Line]) -> None:
        """These lines as the file, or the file as it was."""
        target = self._path.resolve()  # a link to the file stays one
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_bytes(b"".join(line.to_json() for line in lines))
            sync(partial)
            fresh = self._opened(partial)
            try:
                partial.rename(target)
                sync(target.parent)
            except OSError:
                os.close(fresh)
                raise
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise not_written(self._path, error, "start the same command again", "the file is as it was") from error
        # Last, for who gets the lock on the old file must find that another stands in its place.
        os.close(self._file)
        self._file = fresh

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines, all of them or none, and return when they are on the disk. Raises NotSaved."""
        before, text = os.fstat(self._file).st_size, b"".join(line.to_json() for line in lines)
        try:
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            safe = f"the {self._count} records scored before are in it"
            raise not_written(self._path, error, "start the same command again", safe) from error
        self._count += len(lines)


def _is_beginning(text: bytes) -> bool:
    """Whether a text is a piece of a line's beginning."""
    return bool(_BEGIN.match(text + b'{"key": "0000000000000000", "id": "'[len(text) :]))


def one_of_each(names: Sequence[Name], lines: Iterable[Line]) -> list[Line | None]:
    """For each name a line of that name, None where there is none (any more)."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(line.name, []).append(line)
    return [found[name].pop() if found.get(name) else None for name in names]
