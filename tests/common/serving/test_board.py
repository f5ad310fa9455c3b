"""What is shown of servers that start: one line each, cut where the terminal ends."""

from __future__ import annotations

import io
import re

from rich.console import Console

from common.serving.board import Board, Row

ROWS = [
    Row("general at http://127.0.0.1:8001", 7.4, "loading [weights] " * 20),
    Row("safety at http://127.0.0.1:8002", 71.0, "x"),
]


def shown(terminal: bool) -> list[str]:
    text = io.StringIO()
    with Board(Console(file=text, force_terminal=terminal, color_system=None, width=60)) as board:
        board.say("before [all]")
        board.show(ROWS)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text.getvalue()).splitlines()


def test_a_terminal_has_a_line_a_server() -> None:
    lines = [line for line in shown(terminal=True) if " s  " in line]
    assert lines[0].startswith("general at http://127.0.0.1:8001     7 s  loading [wei") and lines[0].endswith("…")
    assert len(lines[0]) == 60
    assert lines[1].startswith("safety at http://127.0.0.1:8002    71 s  x")


def test_elsewhere_lines_come_from_time_to_time_alone() -> None:
    assert shown(terminal=False) == ["before [all]"]
