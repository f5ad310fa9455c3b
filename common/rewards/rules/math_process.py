"""The trainer's side of the math worker: start it when needed, hold the wall clock, kill it when time is up."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.types import Missing

STARTUP_S = 120.0
_PACKAGE_ROOT = str(Path(__file__).parents[3])


class MathProcess:
    """Compares two expressions in a separate process, within `limit_s` seconds of wall-clock time each.

    The process starts with the first comparison and starts anew after a kill. Safe to call from several threads.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The running worker's process id."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def equal(self, reference: str, answer: str) -> bool | Missing:
        """Are the two LaTeX expressions mathematically equal? `Missing` if the worker ran out of time or died."""
        with self._lock:
            process = self._running()
            task = json.dumps({"reference": reference, "answer": answer}) + "\n"
            reply = self._ask(process, task.encode(), self.limit_s)
            if reply is not None:
                return bool(json.loads(reply)["equal"])
            why = "took longer than" if process.poll() is None else f"died (exit code {process.returncode}) within"
            self._stop()
        return Missing(f'comparing the answer "{answer}" with the reference "{reference}" {why} {self.limit_s:g} s')

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        # One BLAS thread: more reserve memory that counts against the worker's limit.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "common.rewards.rules.math_worker", str(self.limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads | {"PYTHONPATH": path},
            start_new_session=True,  # a signal for the trainer and its group is not one for the worker
        )
        if self._ask(self._process, b"", STARTUP_S) is None:
            code = self._process.poll()
            self._stop()
            state = f"ended with exit code {code}" if code is not None else f"was not ready after {STARTUP_S:g} s"
            raise RuntimeError(f"The math worker {state}; its error is above. Is math-verify installed?")
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], task: bytes, limit_s: float) -> bytes | None:
        """The worker's next line, or None if it does not come in time or the worker ends."""
        assert process.stdin and process.stdout
        deadline = time.monotonic() + limit_s
        reply = b""
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            try:
                process.stdin.write(task)
                process.stdin.flush()
            except BrokenPipeError:
                process.wait(STARTUP_S)
                return None
            while not reply.endswith(b"\n"):
                if not ready.select(max(deadline - time.monotonic(), 0)):
                    return None
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:  # it is ending: wait, so that its exit code is known
                    process.wait(STARTUP_S)
                    return None
                reply += chunk
        return reply

    def _stop(self) -> None:
        """Kill the worker, collect it and close its pipes."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:  # an unwritten task of a dead worker
                continue
        self._process = None
