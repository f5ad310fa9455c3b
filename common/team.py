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
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from queue import SimpleQueue
from typing import Any, TypeVar

from common.interrupt import INTERRUPTED

Item = TypeVar("Item")
Result = TypeVar("Result")

_JOIN_S = 300.0  # for every process to be there
_GREETING_S, _LOOK_S = 20.0, 0.2  # for one connection to say who it is; between two looks at who is there
_NOWHERE = ("192.0.2.1", 9)  # an address of documentation: on the way to it stands what others reach this host by
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


def told_place() -> Place | None:
    """The place that the environment gives this process in the words of torchrun; None where it speaks of none.

    Raises ProcessesParted when it says only half of it.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return None
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            problem = f"is {text!r}" if text else "is not set"
            raise ProcessesParted(
                f"the environment speaks of several processes (WORLD_SIZE, RANK), but {name} {problem}. Start all of "
                "them by torchrun or safework launch, or unset what is left of another start."
            )
        numbers.append(int(text))
    index, count, local_index = numbers
    return Place(index, count, local_index, socket.gethostname())


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
        self.status = 0  # with which this process ends, after an error in what it did with the others
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

    @property
    def feeds(self) -> bool:
        """Whether this process works for its host in `shared`."""
        return self.places[self.index].local_index == 0

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
        self._over.acquire()  # for good: what the others do from here on is no news to this process
        if error is None:
            self._tell(("done",))
            return
        stopped = isinstance(error, KeyboardInterrupt)
        self.status = INTERRUPTED if stopped else 1
        what = "at once, by a signal." if stopped else str(error) or type(error).__name__
        self._tell(("ended", f"{self.places[self.index]} stopped: {what}", self.status))

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
                    case ("done",):
                        self._done.add(peer)
                    case ("ended", sentence, status):
                        self._give_up(sentence, status)
        except (EOFError, OSError):
            if peer not in self._done:
                self._give_up(
                    f"{self.places[peer]} ended without a word: it was killed, crashed or cannot be reached.", 1
                )

    def _give_up(self, sentence: str, status: int) -> None:
        """End this process, wherever it is: its work cannot be finished."""
        if not self._over.acquire(blocking=False):
            return  # it is at its end already
        self._tell(("ended", sentence, status))
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(status)

    def _tell(self, message: tuple[Any, ...]) -> None:
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
    process 0 by `$MASTER_ADDR`, or else by the outward address or the name of its host. Raises ProcessesParted when one
    does not come within five minutes.
    """
    try:
        return _gather(place, spread, deadline_s) if place.index == 0 else _join(place, spread, deadline_s)
    except (OSError, EOFError, AuthenticationError) as error:
        raise ProcessesParted(
            f"{place}: could not connect with process 0 ({error or type(error).__name__}). Let the "
            "hosts of the run reach each other on all ports."
        ) from error


def _gather(place: Place, spread: Callable[[bytes], bytes], deadline_s: float) -> Team:
    key = secrets.token_bytes(32)
    with socket.create_server(("", 0), backlog=place.count) as server:
        spread(pickle.dumps((_own_hosts(place), server.getsockname()[1], key)))
        joined = _joined(server, key, place)
    places = [place, *(joined[index][0] for index in range(1, place.count))]
    connections = {index: connection for index, (_, connection) in joined.items()}
    for connection in connections.values():
        connection.send(places)
    return Team(places, 0, connections, deadline_s)


def _joined(server: socket.socket, key: bytes, place: Place) -> dict[int, tuple[Place, Connection]]:
    """All other processes, by index. Each connection is heard in a thread of its own, so that a stranger who connects
    and says nothing keeps nobody waiting.
    """
    arrived: SimpleQueue[tuple[Place, Connection]] = SimpleQueue()
    joined: dict[int, tuple[Place, Connection]] = {}
    server.settimeout(_LOOK_S)
    end = time.monotonic() + _JOIN_S
    while len(joined) < place.count - 1:
        with suppress(TimeoutError):
            threading.Thread(target=_greet, args=(server.accept()[0], key, arrived), daemon=True).start()
        while not arrived.empty():
            other, connection = arrived.get()
            joined[other.index] = other, connection
        if time.monotonic() > end:
            missing = ", ".join(str(index) for index in range(1, place.count) if index not in joined)
            raise ProcessesParted(
                f"{place}: without {missing} after {_JOIN_S:.0f} s. See what they printed, and let the hosts "
                "of the run reach each other on all ports."
            )
    return joined


def _greet(made: socket.socket, key: bytes, arrived: SimpleQueue[tuple[Place, Connection]]) -> None:
    """Hand on who has connected, once it has proved that it knows the key; a stranger is let go."""
    connection = _connection(made)
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        other: Place = connection.recv()
        _set_patience(connection, 0)
        arrived.put((other, connection))
    except (OSError, EOFError, AuthenticationError):
        connection.close()


def _join(place: Place, spread: Callable[[bytes], bytes], deadline_s: float) -> Team:
    hosts, port, key = pickle.loads(spread(b""))
    connection = _reached(hosts, port, key)
    connection.send(place)
    _set_patience(connection, 0)
    return Team(connection.recv(), place.index, {0: connection}, deadline_s)


def _reached(hosts: Sequence[str], port: int, key: bytes) -> Connection:
    """A connection to process 0 by the first of its names that leads there. Raises what the last one said."""
    *others, last = hosts
    for host in others:
        with suppress(OSError, EOFError, AuthenticationError):
            return _admitted(host, port, key)
    return _admitted(last, port, key)


def _admitted(host: str, port: int, key: bytes) -> Connection:
    connection = _connection(socket.create_connection((host, port), _GREETING_S))
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    return connection


def _own_hosts(place: Place) -> list[str]:
    """Names by which others may reach this host."""
    if "MASTER_ADDR" in os.environ:
        return [os.environ["MASTER_ADDR"]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(_NOWHERE)  # sends nothing, and finds the address that such a packet would leave from
        return [probe.getsockname()[0], place.host]
    return [place.host]


def _connection(made: socket.socket) -> Connection:
    made.settimeout(None)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection = Connection(made.detach())
    _set_patience(connection, _GREETING_S)
    return connection


def _set_patience(connection: Connection, seconds: float) -> None:
    """How long one read of a connection waits at most; 0: for ever."""
    with socket.socket(fileno=os.dup(connection.fileno())) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))
