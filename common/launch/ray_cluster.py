"""A run on a Ray cluster: servers and trainer processes placed, watched, restarted where that may be, and stopped."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.interrupt import INTERRUPTED, Interrupt
from common.launch.job import STOPPED, Job, command
from common.launch.placing import Bundles, connect, place, server_bundles, trainer_bundles
from common.launch.program import Spot
from common.launch.watching import LaunchFailed, Member, culprit

_PARTING_S = 60.0  # for the processes of a run to end with the first of them
_STOPPING_S = 45.0  # for servers to stop
_STARTS = 5  # of one replica


class Ray(NamedTuple):
    """What the cluster is asked for. processes: of the trainer; 0: as many as fit. address: of the cluster; empty: that
    of `$RAY_ADDRESS`, or else this machine alone. restarts: of the trainer as a whole.
    """

    processes: int
    address: str
    restarts: int


def run(job: Job, asked: Ray, say: Callable[[str], None]) -> int:
    """Run a job to its end; returns the exit status. A first Ctrl-C or SIGTERM finishes the step and saves.

    Every node needs this environment and this folder at the same paths. Raises ConfigError when the cluster cannot hold
    the job, and LaunchFailed.
    """
    with connect(asked.address) as cluster, Interrupt("step") as interrupt:
        servers = place(cluster, server_bundles(cluster, job), "servers")
        trainers = place(cluster, trainer_bundles(cluster, job, asked.processes), "trainer processes")
        fleet = _Fleet(job, servers, say, interrupt)
        try:
            if not fleet.bring_up():
                return INTERRUPTED
            return _Training(job, asked.restarts, trainers, fleet, say, interrupt).run()
        finally:
            fleet.stop()


class _Fleet:
    """The replicas of all servers. One that ends is started again, at its address."""

    def __init__(self, job: Job, bundles: Bundles, say: Callable[[str], None], interrupt: Interrupt) -> None:
        self._job, self._say, self._interrupt = job, say, interrupt
        names = [name for name in job.launched for _ in job.loaded.config.servers[name].urls]
        self._bundles, self._names = bundles, names
        self._members = [Member(f"server {name} {index}", bundles.actor(index)) for index, name in enumerate(names)]
        self._spots: list[Spot] = []

    def bring_up(self) -> bool:
        """Start all and wait until they are ready; False when a signal comes first."""
        self._spots = [member.spot() for member in self._members]
        for index in range(len(self._members)):
            self._start(index)
        while not all(member.ready for member in self._members):
            if self._interrupt.requested:
                return False
            self.watch()
            time.sleep(0.2)
        return True

    def _start(self, index: int) -> None:
        name = self._names[index]
        words = ("--only", name, "--logs", f"servers/{self._job.name}", self._urls_word(name, [index]))
        self._members[index].start(command("serve", *self._job.words, *words), {}, self._spots[index].port)

    def _urls_word(self, name: str, indices: Sequence[int]) -> str:
        urls = [f"http://{self._spots[index].address}:{self._spots[index].port}" for index in indices]
        return f"servers.{name}.urls={json.dumps(urls)}"

    def overrides(self) -> list[str]:
        """Where the servers are, for the trainer's config."""
        places = {name: [i for i, each in enumerate(self._names) if each == name] for name in self._names}
        return [self._urls_word(name, indices) for name, indices in places.items()]

    def watch(self) -> None:
        """Print what is new, and start again what has ended. Raises LaunchFailed when that was too often."""
        for index, member in enumerate(self._members):
            member.hear(self._say)
            if not member.ended:
                continue
            if member.starts == _STARTS:
                raise LaunchFailed(f"{member.fault()}. It was started {_STARTS} times.")
            self._say(f"{member.fault()}; starting it again")
            if member.lost:
                member.replace(self._bundles.actor(index))
            self._start(index)

    def stop(self) -> None:
        """End all servers, with what they started."""
        stop(self._members, signal.SIGTERM, _STOPPING_S, self._say)


class _Training:
    """The trainer's processes: all of them or none."""

    def __init__(
        self,
        job: Job,
        restarts: int,
        bundles: Bundles,
        fleet: _Fleet,
        say: Callable[[str], None],
        interrupt: Interrupt,
    ) -> None:
        self._job, self._restarts, self._bundles, self._fleet = job, restarts, bundles, fleet
        self._say, self._interrupt = say, interrupt

    def run(self) -> int:
        """The exit status, of as many tries as it takes; each goes on from the newest checkpoint."""
        for tries_left in range(self._restarts, -1, -1):
            members = self._begin()
            try:
                self._watch(members)
                statuses, fault = {member.status for member in members}, culprit(members).fault()
            finally:
                stop(members, signal.SIGKILL, _STOPPING_S, self._say)
            if statuses == {0}:
                return 0
            if statuses <= {*STOPPED, -signal.SIGTERM}:
                return INTERRUPTED
            if self._interrupt.requested or not tries_left:
                raise LaunchFailed(f"{fault}. The same command goes on from the run's newest checkpoint.")
            self._say(f"{fault}; starting all trainer processes again ({tries_left} times left)")
        raise AssertionError("the last try has returned or raised")

    def _begin(self) -> list[Member]:
        """Start all processes, those of one node beside each other."""
        actors = [self._bundles.actor(index) for index in range(self._bundles.size)]
        asked = [Member("a trainer process", actor) for actor in actors]
        spots = [(member.spot(), member.actor) for member in asked]
        spots.sort(key=lambda pair: pair[0].node)
        nodes = [spot.node for spot, _ in spots]
        master, count = spots[0][0], len(spots)
        members = []
        for rank, (spot, actor) in enumerate(spots):
            member = Member(f"trainer {rank} of {count} ({spot.address})", actor)
            local = [other for other, _ in spots if other.node == spot.node]
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank - nodes.index(spot.node)),
                "LOCAL_WORLD_SIZE": str(len(local)),
                "MASTER_ADDR": master.address,
                "MASTER_PORT": str(master.port),
            }
            if spot.gpus:  # processes of a node see all of its GPUs and take their own by LOCAL_RANK, as by torchrun
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in local for gpu in other.gpus)
            member.start(command("train", *self._job.words, *self._fleet.overrides()), environment)
            members.append(member)
        return members

    def _watch(self, members: list[Member]) -> None:
        """Until all have ended, or one has and the others had their time to end with it."""
        told, parting_at = False, float("inf")
        while not all(member.ended for member in members) and time.monotonic() < parting_at:
            for member in members:
                member.hear(self._say)
            if any(member.ended for member in members):
                parting_at = min(parting_at, time.monotonic() + _PARTING_S)
            else:
                self._fleet.watch()
            if self._interrupt.requested and not told:
                told = True
                for member in members:
                    member.signal(signal.SIGTERM)
            time.sleep(0.2)


def stop(members: Sequence[Member], number: int, limit_s: float, say: Callable[[str], None]) -> None:
    """Send a signal to what still runs, wait for its end, and let go of the actors."""
    for member in members:
        member.signal(number)
    end = time.monotonic() + limit_s
    while not all(member.ended for member in members) and time.monotonic() < end:
        for member in members:
            member.hear(say)
        time.sleep(0.2)
    for member in members:
        member.let_go()
