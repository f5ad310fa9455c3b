"""One process of a team that does what its words say, one after the other: a program for tests/common/test_team.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from common.interrupt import INTERRUPTED
from common.team import ProcessesParted, Team
from tests.teams import open_team


def act(team: Team, word: str) -> None:
    """Do one thing; one that begins with an index and a colon only in that process."""
    who, _, deed = word.rpartition(":")
    if who and int(who) != team.index:
        return
    match deed:
        case "meet":
            print(team.exchange(team.index * 10, "the meeting"), flush=True)
        case "large":
            print([len(part) for part in team.exchange(bytes(20_000_000 + team.index), "the meeting")], flush=True)
        case "share":
            print(team.shared(range(7), lambda items: [(team.index, item) for item in items], "the work"), flush=True)
        case "fail":
            raise ValueError("the disk is full")
        case "signal":
            raise KeyboardInterrupt
        case "sleep":
            time.sleep(600)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            raise AssertionError(word)


def main(words: Sequence[str]) -> int:
    """Words: the deadline in seconds, then the deeds."""
    try:
        with open_team(float(words[0])) as team:
            for word in words[1:]:
                act(team, word)
    except (ProcessesParted, ValueError) as error:
        print(f"own error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
