"""The processes of one run: what they tell each other, and how the end of one ends them all within seconds.

A star of plain sockets: process 0 holds a connection to every other, and whatever one says goes through it. Arrays of a
model's size do not come this way, those are for the engines' own collectives. A process that is killed closes its
connection, a host that loses its power no longer answers the kernel's probes, and an error is told before it ends its
process: in each case the others say which one it was and stop, even out of a collective that would wait for ever.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_JOIN_S = 300.0  # for every process to be there
# A host that answers nothing is taken for dead after half a minute, whether or not it was being sent something.
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_LATER_S = 10.0  # by how much process 0 is given longer, which knows who is late
_NEWS_S = 1.0  # for what another process has to say, before the error that it caused here


class ProcessesParted(RuntimeError):
    """A process of the run did not come where all others wait for it; the message names it."""


@dataclass(frozen=True)
class Place:
    """Which process of a run this is: its index among `count`, its index among those of its host, and the host."""

    index: int
    count: int
    local_index: int
    host: str

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} ({self.host})"


class Team:
    """The processes of a run as each of them sees it. Use as a context, around all that they do together.

    places: of all processes, by index. connections: by index, in process 0 to all others, in the others to process 0.
    What is exchanged is pickled, since all processes are one job of one user.
    """

    def __init__(
        self, places: Sequence[Place], index: int, connections: dict[int, Connection], deadline_s: float
    ) -> None:
        self.places, self.index = places, index
        self._connections, self._deadline_s = connections, deadline_s
        self._sending = {peer: threading.Lock() for peer in connections}
        self._news = threading.Condition()
        self.failed = False  # whether an error ended what this process did in it
        self._turn = 0
        self._said: defaultdict[int, dict[int, Any]] = defaultdict(dict)  # in process 0: turn -> index -> value
        self._heard: dict[int, list[Any]] = {}  # in the others: turn -> the values of all
        self._done: set[int] = set()
        self._over = threading.Lock()  # taken by what ends this process first
        for peer in connections:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def exchange(self, value: Any, what: str) -> list[Any]:
        """The value of every process, by index. `what` says to a person where they meet.

        Raises ProcessesParted when one has not come after the deadline.
        """
        self._turn += 1
        if self.leads:
            return self._collect(value, what)
        self._send(0, ("said", self._turn, value))
        self._wait(lambda: self._turn in self._heard, self._deadline_s + _LATER_S, lambda: [0], what)
        return self._heard.pop(self._turn)

    def _collect(self, value: Any, what: str) -> list[Any]:
        said = self._said[self._turn]
        said[0] = value
        self._wait(lambda: len(said) == len(self.places), self._deadline_s, lambda: self._missing(said), what)
        values = [said[index] for index in range(len(self.places))]
        del self._said[self._turn]
        for peer in self._connections:
            self._send(peer, ("heard", self._turn, values))
        return values

    def _missing(self, said: dict[int, Any]) -> list[int]:
        return [index for index in range(len(self.places)) if index not in said]

    def _wait(self, arrived: Callable[[], bool], seconds: float, late: Callable[[], list[int]], what: str) -> None:
        with self._news:
            if not self._news.wait_for(arrived, seconds):
                names = ", ".join(str(self.places[index]) for index in late())
                raise ProcessesParted(
                    f"{names}: not there for {what} after {seconds:.0f} s (run.deadline_s = {self._deadline_s:g}). See "
                    "what it does, or give it longer."
                )

    def shared(self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]], what: str) -> list[Result]:
        """The results of `work` for all items, in order. The first process of each host does an equal share of them."""
        feeders = [place.index for place in self.places if place.local_index == 0]
        mine = items[feeders.index(self.index) :: len(feeders)] if self.index in feeders else []
        parts = self.exchange(work(mine) if len(mine) else [], what)
        return [parts[feeders[place % len(feeders)]][place // len(feeders)] for place in range(len(items))]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and self._connections:
            time.sleep(_NEWS_S)  # a collective fails where another process has ended: then its end is the news
        self.failed = error is not None
        self._over.acquire()  # for good: what the others do from here on is no news to this process
        stopped = f"{self.places[self.index]} stopped: {error or type(error).__name__}"
        self._tell(("done", "") if error is None else ("ended", stopped))

    def _listen(self, peer: int) -> None:
        """Take in what one connection brings, until it ends."""
        try:
            while True:
                match pickle.loads(self._connections[peer].recv_bytes()):
                    case ("said", turn, value):
                        with self._news:
                            self._said[turn][peer] = value
                            self._news.notify_all()
                    case ("heard", turn, values):
                        with self._news:
                            self._heard[turn] = values
                            self._news.notify_all()
                    case ("done", _):
                        self._done.add(peer)
                    case ("ended", sentence):
                        self._give_up(sentence)
        except (EOFError, OSError):
            if peer not in self._done:
                self._give_up(f"{self.places[peer]} ended without a word: it was killed, crashed or cannot be reached.")

    def _give_up(self, sentence: str) -> None:
        """End this process, wherever it is: its work cannot be finished."""
        if not self._over.acquire(blocking=False):
            return  # it is at its end already
        self._tell(("ended", sentence))
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    def _tell(self, message: tuple[str, str]) -> None:
        for peer in self._connections:
            with suppress(OSError):
                self._send(peer, message)

    def _send(self, peer: int, message: tuple[Any, ...]) -> None:
        data = pickle.dumps(message)
        with self._sending[peer]:
            self._connections[peer].send_bytes(data)


def alone() -> Team:
    """The team of a run in one process."""
    return Team([Place(0, 1, 0, socket.gethostname())], 0, {}, 0.0)


def assemble(place: Place, spread: Callable[[bytes], bytes], deadline_s: float) -> Team:
    """The team of a run in several processes, each of which calls this at the same time.

    spread: gives every process what process 0 gave it, 1 kB at most, by whatever the engine has. The others reach
    process 0 by `$MASTER_ADDR`, or else by the name of its host. Raises ProcessesParted when one does not come within
    five minutes.
    """
    try:
        return _gather(place, spread, deadline_s) if place.index == 0 else _join(place, spread, deadline_s)
    except (OSError, EOFError, AuthenticationError) as error:
        raise ProcessesParted(
            f"{place}: could not connect with process 0 ({error or type(error).__name__}). Let the "
            "hosts of the run reach each other on all ports."
        ) from error


def _gather(place: Place, spread: Callable[[bytes], bytes], deadline_s: float) -> Team:
    key, connections, places = secrets.token_bytes(32), {}, {0: place}
    with socket.create_server(("", 0), backlog=place.count) as server:
        server.settimeout(_JOIN_S)
        host = os.environ.get("MASTER_ADDR", place.host)
        spread(pickle.dumps((host, server.getsockname()[1], key)))
        while len(places) < place.count:
            connection = _connection(server.accept()[0])
            with suppress(OSError, EOFError, AuthenticationError):  # a stranger
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
                other: Place = connection.recv()
                connections[other.index], places[other.index] = connection, other
    ordered = [places[index] for index in range(place.count)]
    for connection in connections.values():
        connection.send(ordered)
    return Team(ordered, 0, connections, deadline_s)


def _join(place: Place, spread: Callable[[bytes], bytes], deadline_s: float) -> Team:
    host, port, key = pickle.loads(spread(b""))
    connection = _connection(socket.create_connection((host, port), _JOIN_S))
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    connection.send(place)
    return Team(connection.recv(), place.index, {0: connection}, deadline_s)


def _connection(made: socket.socket) -> Connection:
    made.settimeout(None)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(made.detach())
