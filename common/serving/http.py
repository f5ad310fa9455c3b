"""HTTP to the replicas of one server: least busy first, a limit on what is in flight, deadlines, retries, a breaker.

Every call ends within its deadline, with the reply or with a sentence that names the replica at fault.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from common.config.servers import ServerSection

_RETRIED = (408, 425, 429, 500, 502, 503, 504)  # a busy or restarting server; anything else would be refused again
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_BREAKS_AFTER, _LONGEST_REST_S = 5, 5.0
_LONGEST_SHOWN = 200
# What JSON of another shape than expected raises; a number too large for float32 is the OverflowError.
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


class Call(NamedTuple):
    """A POST and how its reply is read: `read` turns the JSON into what is wanted, and raises one of UNREADABLE when
    that is not in there; Unanswered when no other try would have it either.
    """

    path: str
    payload: dict[str, Any]
    read: Callable[[Any], Any]


class Reply(NamedTuple):
    """What came of a call: its result or its failure, the seconds it waited for a worker, and those from then on."""

    result: Any
    queue_s: float
    latency_s: float


class CallFailed(Exception):
    """No usable reply within the deadline, or a refusal; the message names the replica and what it did."""


class Unanswered(Exception):
    """A reply that is sound and lacks what was asked for, as it would every time; the message says what."""


class _Worthwhile(Exception):
    """A failure that another try may not have; the message says what happened."""


@dataclass(eq=False)
class Replica:
    """One address of a server, and how it has been doing."""

    url: str
    whole_rest_s: float
    failures: int = 0  # in a row
    resting_until: float = 0.0

    def failed(self) -> None:
        """Rest for a while after several failures in a row, so that calls go to the others."""
        self.failures += 1
        if self.failures >= _BREAKS_AFTER:
            self.resting_until = time.monotonic() + self.whole_rest_s

    @property
    def rest_s(self) -> float:
        """Seconds of rest left."""
        return max(self.resting_until - time.monotonic(), 0.0)


@dataclass(eq=False)
class _Task:
    """One call on its way. Its deadline runs from its first try on: what waits for its turn is not late."""

    call: Call
    done: Future[Reply]
    queued_at: float
    started_at: float = 0.0
    tries: int = 0
    deadline: float = 0.0

    def end(self, result: Any) -> None:
        """Hand the result, or the failure, to whoever waits. What was given up before its first try has spent all of
        its time in the queue.
        """
        now = time.monotonic()
        started = self.started_at or now
        self.done.set_result(Reply(result, started - self.queued_at, now - started))


class Replicas:
    """Calls to the replicas of one server, from any thread; its event loop runs in a thread of its own.

    Each replica has `concurrency` workers that take calls from one queue, so the least busy replica takes the next. A
    reply that cannot be read is a failed try. When no replica has replied for `deadline_s` and all of them rest,
    whatever waits has failed.
    """

    def __init__(self, name: str, section: ServerSection, headers: Mapping[str, str]) -> None:
        self._name, self._section, self._headers = name, section, headers
        rest_s = min(section.deadline_s / 10, _LONGEST_REST_S)
        self._replicas = [Replica(url.rstrip("/"), rest_s) for url in section.urls]
        self._loop = asyncio.new_event_loop()
        # As many calls are made ahead of their turn as are on their way.
        self._room = threading.Semaphore(2 * len(self._replicas) * section.concurrency)
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"server-{name}", daemon=True)
        self._thread.start()
        self._run(self._open())

    async def _open(self) -> None:
        self._queue: asyncio.Queue[_Task] = asyncio.Queue()
        self._well_at = time.monotonic()  # the last reply, or the last time that there was nothing to do
        self._last_fault = ""
        self._pending: set[_Task] = set()
        # No limit of connections here: the number of workers is one.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self._headers)
        self._workers = [
            asyncio.create_task(self._work(replica))
            for replica in self._replicas
            for _ in range(self._section.concurrency)
        ]
        for worker in self._workers:
            worker.add_done_callback(self._pass_on)

    def _pass_on(self, worker: asyncio.Task[None]) -> None:
        """A worker ends by a fault of ours alone: hand it to whoever waits, or else they would wait for ever."""
        if not worker.cancelled() and (fault := worker.exception()):
            for task in list(self._pending):
                self._leave(task)
                task.done.set_exception(fault)

    def close(self) -> None:
        """Drop what is in flight, close the connections and end the thread."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._session.close()

    def call_all(self, calls: Iterable[Call]) -> list[Reply]:
        """One reply per call, in order: what its `read` made of it, or CallFailed.

        A call is taken from the iterable shortly before its turn, while others are on their way.
        """
        began = time.monotonic()
        self._loop.call_soon_threadsafe(self._begin)
        replies = []
        for call in calls:
            task = _Task(call, Future(), began)
            self._room.acquire()
            replies.append(task.done)
            self._loop.call_soon_threadsafe(self._enter, task)
        return [reply.result() for reply in replies]

    def _begin(self) -> None:
        if not self._pending:
            self._well_at = time.monotonic()

    def _enter(self, task: _Task) -> None:
        self._pending.add(task)
        self._queue.put_nowait(task)
        self._give_up_if_down()

    def _end(self, task: _Task, result: Any) -> None:
        self._leave(task)
        task.end(result)

    def _leave(self, task: _Task) -> None:
        self._pending.discard(task)
        self._room.release()

    def ask_each(self, path: str, limit_s: float) -> dict[str, Any]:
        """GET a path from every replica, once: url -> its JSON, or CallFailed where none came within the limit."""
        return self._run(self._ask_each(path, limit_s))

    async def _ask_each(self, path: str, limit_s: float) -> dict[str, Any]:
        async def ask(url: str) -> Any:
            try:
                return await self._try("GET", f"{url}{path}", None, limit_s)
            except (_Worthwhile, CallFailed) as error:
                return CallFailed(str(error))

        urls = [replica.url for replica in self._replicas]
        return dict(zip(urls, await asyncio.gather(*map(ask, urls)), strict=True))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _work(self, replica: Replica) -> None:
        while True:
            while replica.rest_s:
                await asyncio.sleep(replica.rest_s)
            task = await self._queue.get()
            if replica.rest_s:
                self._queue.put_nowait(task)
            else:
                await self._serve(replica, task)

    async def _serve(self, replica: Replica, task: _Task) -> None:
        """One try of a call at one replica: its result, another try later, or its failure."""
        task.tries += 1
        now = time.monotonic()
        task.started_at = task.started_at or now
        task.deadline = task.deadline or now + self._section.deadline_s
        left, last_try = task.deadline - now, task.tries > self._section.retries
        if left <= 0:  # it waited too long behind others, and aiohttp would take this for no limit at all
            late = f"no reply within {self._section.deadline_s:g} s (server {self._name}; at last: {self._last_fault})"
            self._end(task, CallFailed(late))
            return
        # Half of what is left, so that another replica can still be asked when this one hangs.
        limit_s = left if last_try else left / 2
        try:
            reply = await self._try("POST", f"{replica.url}{task.call.path}", task.call.payload, limit_s)
            self._well_at = time.monotonic()  # whatever it says, it replies
            self._end(task, _read(task, reply, replica, self._name))
            replica.failures = 0
        except CallFailed as error:  # a refusal: the server is well
            replica.failures, self._well_at = 0, time.monotonic()
            self._end(task, error)
        except _Worthwhile as error:
            replica.failed()
            pause = _pause(task.tries)
            if last_try or time.monotonic() + pause > task.deadline:
                tries = "1 try" if task.tries == 1 else f"{task.tries} tries"
                self._end(task, CallFailed(f"{error} (server {self._name}, {tries})"))
            else:
                self._loop.call_later(pause, self._queue.put_nowait, task)
            self._last_fault = str(error)
            self._give_up_if_down()

    def _give_up_if_down(self) -> None:
        """Fail what waits when every replica rests and none has replied for as long as one call may take."""
        ill_s = time.monotonic() - self._well_at
        if ill_s < self._section.deadline_s or not all(replica.rest_s for replica in self._replicas):
            return
        while not self._queue.empty():
            error = CallFailed(f"no reply for {ill_s:.0f} s (server {self._name}; at last: {self._last_fault})")
            self._end(self._queue.get_nowait(), error)

    async def _try(self, method: str, where: str, payload: dict[str, Any] | None, limit_s: float) -> Any:
        try:
            limit = aiohttp.ClientTimeout(total=limit_s)
            async with self._session.request(method, where, json=payload, timeout=limit) as response:
                body = await response.read()
        except TimeoutError:
            raise _Worthwhile(f"{where} did not reply within {limit_s:.3g} s") from None
        except (aiohttp.ClientError, UnicodeError) as error:  # the latter of a redirection to what is no name
            raise _Worthwhile(f"{where}: {str(error) or type(error).__name__}") from None
        if response.status in _RETRIED:
            raise _Worthwhile(f"{where} said HTTP {response.status}: {_shown(body)}")
        if response.status != 200:
            raise CallFailed(f"{where} said {status_text(response.status)}: {_shown(body)} (server {self._name})")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise _Worthwhile(f"{where} replied no JSON but {_shown(body)}") from None


def status_text(status: int) -> str:
    """An HTTP status, with what to do about a refused key."""
    hint = " (servers.NAME.api_key_env names the variable with its key)" if status == 401 else ""
    return f"HTTP {status}{hint}"


def _read(task: _Task, reply: Any, replica: Replica, server: str) -> Any:
    try:
        return task.call.read(reply)
    except Unanswered as error:
        raise CallFailed(f"{replica.url}{task.call.path}: {error} (server {server})") from None
    except UNREADABLE as error:
        raise _Worthwhile(f"{replica.url}{task.call.path} replied {_shown(reply)} ({error!r})") from None


def _pause(tries: int) -> float:
    """Seconds before the next try: doubling, with jitter so that calls that failed together do not return together."""
    return min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)


def _shown(body: Any) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else repr(body)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
