"""The servers that one command starts: brought up together, watched, and stopped together."""

from __future__ import annotations

import asyncio
import errno
import re
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from rich.console import Console

from common.config import ConfigError, LoadedConfig
from common.serving.board import Board, Row
from common.serving.health import why_unready
from common.serving.launch import Address
from common.serving.served import ServerError, authorization
from common.serving.server_process import ServerProcess
from common.serving.sites import Site, cannot_listen, find_sites

_POLL_S, _LOOK_S = 1.0, 5.0
_SHOWN_LINES = 20


def serve(loaded: LoadedConfig, only: str | None, logs: Path, console: Console) -> bool:
    """Bring up the servers of a config, or the one named, and keep those that were started here until a signal.

    `logs` is the folder of their output. Returns whether they were ever ready. Raises ConfigError for what cannot be
    started or finds its port taken, and ServerError for a key that is not set, or a server that ends or is not ready in
    time, when all others have been stopped.
    """
    plan = find_sites(loaded, only)
    for site in plan.sites:
        authorization(site.server, site.section)  # before anything is started that could not be asked
    with Board(console) as board:
        for text in plan.left_out:
            board.say(text)
        return asyncio.run(_Fleet(plan.sites, logs, board).run())


@dataclass(eq=False)
class _Member:
    """A site, and how it is doing. `process` is None for a server that was not started here."""

    site: Site
    began_at: float
    process: ServerProcess | None = None
    ready: bool = False
    state: str = "not asked yet"

    @property
    def seconds(self) -> float:
        """Since it was begun."""
        return time.monotonic() - self.began_at

    def row(self) -> Row:
        """What to show of it: the last that it wrote, or where its output is not ours, its last reply."""
        state = self.process.last_line() if self.process else self.state
        return Row(self.site.title, self.seconds, state)

    def fault(self, problem: str) -> ServerError:
        """A problem with the end of the log."""
        text = f"server {self.site.server} at {self.site.url} {problem}"
        if self.process is None:
            return ServerError(text)
        lines = "\n".join(f"  | {line}" for line in self.process.last_words(_SHOWN_LINES))
        return ServerError(f"{text}\nThe end of {self.process.log}:\n{lines}")


class _Fleet:
    """Servers from their start to their end. The first SIGINT, SIGTERM or SIGHUP stops them, a second one at once."""

    def __init__(self, sites: list[Site], logs: Path, board: Board) -> None:
        self._sites, self._logs, self._board = sites, logs, board
        self._members: list[_Member] = []
        self._signals = 0

    async def run(self) -> bool:
        """See `serve`. Returns at once when none had to be started here."""
        self._heed_signals()
        try:
            async with aiohttp.ClientSession() as session:
                for site in self._sites:
                    self._members.append(await self._found(session, site))
                self._start()
                if not await self._all_ready(session):
                    return False
            self._say_ready()
            while not self._signals and any(member.process for member in self._members):
                self._refuse_ended("")
                await asyncio.sleep(_POLL_S)
            return True
        except ServerError as error:
            self._board.say(str(error).splitlines()[0])  # stopping the others takes a while
            raise
        finally:
            self._board.show([])
            await self._stop()

    def _heed_signals(self) -> None:
        def note() -> None:
            self._signals += 1

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A command under nohup stays when its terminal goes.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, note)

    async def _found(self, session: aiohttp.ClientSession, site: Site) -> _Member:
        """What is at a url before anything is started."""
        member = _Member(site, time.monotonic())
        if site.here is None:
            self._board.say(f"{site.title}: not on this machine, only waited for")
        elif _is_taken(site.here.address):
            try:
                problem = await why_unready(session, site, _LOOK_S)
            except ServerError as error:
                problem = str(error)
            if problem is not None:
                raise ConfigError(
                    f"{site.title}: port {site.here.address.port} is taken by something else ({problem.rstrip('.')}). "
                    f"Stop that, or choose another port in servers.{site.server}.urls."
                )
            self._board.say(f"{site.title}: serves {site.served_name} already, and is left alone")
            member.ready = True
        return member

    def _start(self) -> None:
        """Start what is on this machine and not there yet."""
        for member in self._members:
            site, here = member.site, member.site.here
            if here is None or member.ready:
                continue
            log = self._logs / f"{re.sub(r'[^A-Za-z0-9_-]', '_', site.server)}-{here.address.port}.log"
            try:
                self._logs.mkdir(parents=True, exist_ok=True)
                member.process = ServerProcess(here.command, here.environment, log)
            except OSError as error:
                raise ConfigError(
                    f"{site.title}: could not be started ({error}). Give --logs a folder that can be written, and "
                    f"servers.{site.server}.launch.python a Python of this machine."
                ) from None
            member.began_at = time.monotonic()
            self._board.say(f"{site.title}: starting, log in {log}")

    async def _all_ready(self, session: aiohttp.ClientSession) -> bool:
        """Wait until all are ready; False when a signal comes first."""
        while not self._signals:
            waiting = [member for member in self._members if not member.ready]
            if not waiting:
                return True
            await asyncio.gather(*(self._ask(session, member) for member in waiting))
            self._refuse_ended("while starting, ")
            for member in waiting:
                self._refuse_late(member)
            self._board.show([member.row() for member in waiting if not member.ready])
            await asyncio.sleep(_POLL_S)
        return False

    async def _ask(self, session: aiohttp.ClientSession, member: _Member) -> None:
        problem = await why_unready(session, member.site, _LOOK_S)
        if problem is not None:
            member.state = problem
        elif member.process is None or member.process.end() is None:  # if it has ended, somebody else replied
            member.ready = True
            self._board.say(f"{member.site.title}: ready after {member.seconds:.0f} s")

    def _refuse_ended(self, when: str) -> None:
        for member in self._members:
            if member.process is not None and (end := member.process.end()) is not None:
                raise member.fault(f"ended {when}after {member.seconds:.0f} s, with {end}.")

    def _refuse_late(self, member: _Member) -> None:
        limit_s = member.site.ready_s
        if not member.ready and member.seconds > limit_s:
            key = f"servers.{member.site.server}.launch.ready_s"
            raise member.fault(f"was not ready within {limit_s:g} s ({key}); at last: {member.state}.")

    def _say_ready(self) -> None:
        self._board.show([])
        self._board.say(f"ready: {', '.join(member.site.title for member in self._members)}")
        if any(member.process for member in self._members):
            self._board.say("Ctrl-C stops what was started here.")
        else:
            self._board.say("Nothing was started here.")

    async def _stop(self) -> None:
        began = self._signals

        async def stop(member: _Member, process: ServerProcess) -> None:
            running = process.end() is None
            how = await process.stop(lambda: self._signals > began)
            if running:
                self._board.say(f"{member.site.title}: {how}")

        started = [(member, member.process) for member in self._members if member.process is not None]
        if any(process.end() is None for _, process in started):
            self._board.say("stopping (Ctrl-C: at once)")
        await asyncio.gather(*(stop(member, process) for member, process in started))


def _is_taken(address: Address) -> bool:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return any(cannot_listen(family, each) == errno.EADDRINUSE for family, _, _, _, each in found)
