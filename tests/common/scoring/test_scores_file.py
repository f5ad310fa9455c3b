"""The file of scores itself: its lines, and who may write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import ConfigError
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
