"""The file of scores itself: its lines, and who may write it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from common.config import ConfigError
from common.disk import NotSaved
from common.run_dir import RunDir
from common.scoring.scores_file import Line, Name, ScoresFile
from common.types import Asked, Missing, Score


def test_lines_are_read_as_they_were_written() -> None:
    results: dict[str, Score | Missing] = {
        "judge": Score(0.1, "“Safe”\n", "Safe", Asked("m", 0.25, 1.5, True)),
        "rule": Score(-1.0, ""),
        "both": Score(0.5, "", "Safe", Asked("m", 0.0, 1.0, False), 0.25),
        "lost": Missing("it is down", asked=Asked("n", 0.0, 2.0, False)),
        "mumbles": Missing("?", True, Asked("n", 0.0, 2.0, False)),
        "own": Missing("no"),
    }
    line = Line(Name("0123456789abcdef", "名"), "标签", None, results)
    assert Line.from_json(line.to_json()) == line
    assert line.to_json().startswith(b'{"key": "') and line.to_json().count(b"\n") == 1


def test_a_file_that_is_being_exchanged_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment of it may another command open the file and begin to write."""
    out, rename = tmp_path / "scores.jsonl", Path.rename
    line = Line(Name("k", "a"), "l", 1.0, {})
    out.write_bytes(line.to_json() + line.to_json()[:9])
    refusals = []

    def refuse() -> None:
        with pytest.raises(ConfigError, match="another process writes its scores there"):
            ScoresFile(out)
        refusals.append(out.read_bytes())

    def watched(path: Path, to: Path) -> Path:
        refuse()
        moved = rename(path, to)
        refuse()
        return moved

    scores = ScoresFile(out)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", watched)
        assert scores.resume([Name("k", "a")]) == [line]
    assert refusals == [line.to_json() + line.to_json()[:9], line.to_json()]
    scores.close()
    ScoresFile(out).close()


KEY = "0123456789abcdef"
LINE = Line(Name(KEY, "a"), "l", 1.0, {})


@pytest.mark.parametrize("length", range(1, len(LINE.to_json())))
def test_what_a_killed_process_left_of_a_line_is_gone_on_from(length: int, tmp_path: Path) -> None:
    out, other = tmp_path / "scores.jsonl", Line(Name(KEY, "b"), "l", 0.5, {})
    out.write_bytes(other.to_json() + LINE.to_json()[:length])
    scores = ScoresFile(out)
    lasting = scores.resume([LINE.name, other.name])
    # Of a line that lacks its end alone, nothing is lost.
    assert lasting == ([other, LINE] if length == len(LINE.to_json()) - 1 else [other])
    scores.append([LINE] if LINE not in lasting else [])
    scores.close()
    assert out.read_bytes() == other.to_json() + LINE.to_json()


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b'{"key": "',
        b'{"key": "value"}',
        b'{"key": "ABCDEF0123456789", "id": "x',
        b'{"key": "0", "id": "x',
        b"notes",
    ],
)
def test_files_of_others_are_left_alone(text: bytes, tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    out.write_bytes(text)
    scores = ScoresFile(out)
    with pytest.raises(ConfigError, match="its line 1 is none that this command writes"):
        scores.resume([LINE.name])
    scores.close()
    assert out.read_bytes() == text and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("path", ["/dev/null", "pipe"])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no file that can be gone on with"):
        ScoresFile(tmp_path / path)


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real, out = tmp_path / "far" / "scores.jsonl", tmp_path / "scores.jsonl"
    real.write_bytes(LINE.to_json() + LINE.to_json()[:20])
    out.symlink_to(real)
    scores = ScoresFile(out)
    assert scores.resume([LINE.name]) == [LINE]
    scores.close()
    assert out.is_symlink() and real.read_bytes() == LINE.to_json()


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync, rename, done = tmp_path / "scores.jsonl", os.fsync, Path.rename, []

    def synced(file: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def renamed(path: Path, to: Path) -> Path:
        done.append("renamed")
        return rename(path, to)

    out.write_bytes(LINE.to_json() + LINE.to_json()[:20])
    scores = ScoresFile(out)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", synced)
        patched.setattr(Path, "rename", renamed)
        scores.resume([LINE.name])
    scores.close()
    assert done == ["scores.jsonl.partial", "renamed", tmp_path.name]


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for claim in (lambda: ScoresFile(tmp_path / "scores.jsonl"), RunDir(tmp_path / "run").claim):
        with pytest.raises(NotSaved, match=r"cannot be kept to one process \(No locks available\)\. Choose a path"):
            claim()
