"""How much memory of its own a process takes while it does something: RssAnon, so that pages of mapped files do not
count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_growth(work: Callable[[], Any]) -> int:
    """The most anonymous memory in bytes during `work`, less what there was before."""
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    done.set()
    watcher.join()
    grown = max(peak, _anonymous()) - before
    del kept  # until the last look
    return grown


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(kib) * 1024
