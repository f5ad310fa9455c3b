"""The processes of a run as JAX sees them: those that torchrun, or whoever sets its variables, has started, or those of
a cluster that JAX knows by itself: TPU pods, SLURM, Open MPI.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from hashlib import sha256

import jax
import numpy as np
from jax.experimental import multihost_utils

from common.team import Place, ProcessesParted, Team, alone, assemble, told_place

_SPREAD_BYTES = 1024
_NO_CLUSTER = "coordinator_address should be defined"  # how JAX says that it has detected none


def open_team(deadline_s: float) -> Team:
    """Join the processes that the environment speaks of, in the words of torchrun or else in those of a cluster that
    JAX detects; alone where it speaks of none.

    Raises ProcessesParted when they do not find each other.
    """
    told = told_place()
    place = _detected() if told is None else _joined(told)
    if place.count == 1:
        return alone()
    team = assemble(place, _spread, deadline_s)
    atexit.register(_leave, team)
    return team


def _joined(place: Place) -> Place:
    """The place itself, when the processes that torchrun speaks of are connected."""
    if place.count == 1:
        return place
    # torchrun's own store listens on MASTER_PORT.
    coordinator = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}"
    try:
        jax.distributed.initialize(coordinator, place.count, place.index, _local_devices(place))
    except RuntimeError as error:
        raise ProcessesParted(f"{place}: did not find process 0 on {coordinator} ({error}).") from error
    return place


def _detected() -> Place:
    """The place in a cluster that JAX detects and has joined; that of a single process where it detects none."""
    host = socket.gethostname()
    single = Place(0, 1, 0, host)
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return single  # which JAX would leave one GPU of those that it has
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        if _NO_CLUSTER in str(error):
            return single
        raise ProcessesParted(f"{host}: did not find the other processes of the cluster ({error}).") from error
    index = jax.process_index()
    own = np.frombuffer(sha256(host.encode()).digest(), np.uint8)
    hosts = multihost_utils.process_allgather(own).reshape(jax.process_count(), -1)
    before = sum(bool((hosts[earlier] == own).all()) for earlier in range(index))
    return Place(index, jax.process_count(), before, host)


def _leave(team: Team) -> None:
    """After an error, end without JAX's own farewell: it waits minutes for the others, whom the error has ended."""
    if team.status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(team.status)


def _local_devices(place: Place) -> list[int] | None:
    """The GPU of this process, where a host has several processes; None leaves all devices of the host to it."""
    return [place.local_index] if int(os.environ["LOCAL_WORLD_SIZE"]) > 1 else None


def _spread(data: bytes) -> bytes:
    padded = np.frombuffer(data.ljust(_SPREAD_BYTES, b"\0"), np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).tobytes()  # pickle ends by itself
