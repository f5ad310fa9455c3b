"""A program that an actor of a Ray cluster runs for the job: a child process on its node, what it prints, its end.

Uses nothing but the standard library and, on the node, Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

# The first words of the child: SIGTERM for it when the actor ends, however that ends, and then the program itself.
_BOUND = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(143); os.execv(sys.argv[2], sys.argv[2:])"
)


_FREED_S = 60.0


class Spot(NamedTuple):
    """Where an actor is: its node, the node's address, the GPUs that are its own, and a port that is free there and the
    one above it too.
    """

    node: str
    address: str
    gpus: list[str]
    port: int


class News(NamedTuple):
    """What a program has printed since it was last asked, and its exit status, negative for a signal; None: it runs."""

    lines: list[str]
    status: int | None


class Program:
    """One child process at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lines: list[str] = []

    def spot(self) -> Spot:
        """Where this is."""
        import ray

        context = ray.get_runtime_context()
        gpus = [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
        return Spot(context.get_node_id(), ray.util.get_node_ip_address(), gpus, _free_port())

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str, port: int) -> str:
        """Start a program in a folder, with variables beside those of the node, when the port that it needs is free (0:
        none); returns why it could not be started.
        """
        if port and not _becomes_free(port):
            return f"port {port} is still taken by what was there before"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOUND, str(os.getpid()), *command],
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        return ""

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.append(line.rstrip("\n"))

    def news(self) -> News:
        """What is new. The last lines come with the exit status."""
        assert self._process is not None and self._reader is not None
        status = self._process.poll()
        if status is not None:
            self._reader.join(2.0)  # a grandchild may hold the pipe for longer
        lines, self._lines = self._lines, []
        return News(lines, status)

    def signal(self, number: int) -> None:
        """Send a signal to the program; SIGKILL to all that it started too."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)


def _becomes_free(port: int) -> bool:
    """Whether a port can be listened at before the time is over in which what held it should have stopped."""
    end = time.monotonic() + _FREED_S
    while time.monotonic() < end:
        with suppress(OSError), socket.create_server(("", port)):
            return True
        time.sleep(0.2)
    return False


def _free_port() -> int:
    while True:
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
            with suppress(OSError), socket.create_server(("", port + 1)):
                return port
