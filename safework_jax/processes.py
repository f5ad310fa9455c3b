"""The processes of a run as JAX sees them: those that torchrun, or whoever sets its variables, has started."""

from __future__ import annotations

import atexit
import os
import socket
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from common.team import Place, ProcessesParted, Team, alone, assemble

_SPREAD_BYTES = 1024


def open_team(deadline_s: float) -> Team:
    """Join the processes that the environment speaks of, in the words of torchrun; alone where it speaks of none.

    Raises ProcessesParted when they do not find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return alone()
    place = Place(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]), socket.gethostname())
    # torchrun's own store listens on MASTER_PORT.
    coordinator = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}"
    try:
        jax.distributed.initialize(coordinator, count, place.index, _local_devices(place))
    except RuntimeError as error:
        raise ProcessesParted(f"{place}: did not find process 0 on {coordinator} ({error}).") from error
    team = assemble(place, _spread, deadline_s)
    atexit.register(_leave, team)
    return team


def _leave(team: Team) -> None:
    """After an error, end without JAX's own farewell: it waits minutes for the others, whom the error has ended."""
    if team.failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _local_devices(place: Place) -> list[int] | None:
    """The GPU of this process, where a host has several processes; None leaves all devices of the host to it."""
    return [place.local_index] if int(os.environ["LOCAL_WORLD_SIZE"]) > 1 else None


def _spread(data: bytes) -> bytes:
    padded = np.frombuffer(data.ljust(_SPREAD_BYTES, b"\0"), np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).tobytes()  # pickle ends by itself
