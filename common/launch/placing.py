"""Where the programs of a job go on a Ray cluster: one bundle of resources for each, placed together or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from common.config import ConfigError
from common.launch.job import Job
from common.launch.program import Program

_PLACING_S = 120.0


class Cluster(NamedTuple):
    """What the nodes that are alive have in all: their number, GPUs, and the TPU chips of each TPU host."""

    nodes: int
    gpus: int
    tpu_hosts: list[int]


class Wanted(NamedTuple):
    """Bundles to be placed, and Ray's word for how."""

    bundles: list[dict[str, float]]
    strategy: str


class Bundles(NamedTuple):
    """Bundles that have been placed. An actor in one of them runs a program."""

    group: Any
    wanted: Wanted

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.wanted.bundles)

    def actor(self, index: int) -> Any:
        """A new actor in one of them."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self.wanted.bundles[index]
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        resources = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "resources": resources}
        return ray.remote(Program).options(**options, scheduling_strategy=strategy, max_restarts=0).remote()


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """A connection to a cluster, and what it has. Raises ConfigError when there is no Ray, or no cluster."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--on ray: Ray cannot be used ({error}). Install it: pip install 'safework[ray]'.") from None
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ConfigError(f"--address {address or 'not given'}: no Ray cluster answers ({error}). Start it.") from None
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        tpus = [int(each["TPU"]) for each in alive if each.get("TPU")]
        yield Cluster(len(alive), int(sum(each.get("GPU", 0) for each in alive)), tpus)
    finally:
        ray.shutdown()


def server_bundles(cluster: Cluster, job: Job) -> Wanted:
    """One for each url of each server with a launch table, apart from each other where there is room.

    Raises ConfigError for a server that says itself which GPUs are its own.
    """
    bundles = []
    for name in job.launched:
        section = job.loaded.config.servers[name]
        assert section.launch is not None
        if cluster.gpus and "CUDA_VISIBLE_DEVICES" in section.launch.environment:
            key = f"servers.{name}.launch.environment.CUDA_VISIBLE_DEVICES"
            raise ConfigError(f"{key} ({job.loaded.origin(key)}): Ray gives each replica its GPUs. Leave it out.")
        gpus = {"GPU": float(section.launch.tensor_parallel)} if cluster.gpus else {}
        bundles += [{"CPU": 1.0, **gpus} for _ in section.urls]
    return Wanted(bundles, "SPREAD")


def trainer_bundles(cluster: Cluster, job: Job, processes: int) -> Wanted:
    """One for each process: a GPU, packed on few nodes; or a TPU host; or, with neither, a CPU of each node."""
    if cluster.gpus:
        used = sum(int(bundle["GPU"]) for bundle in server_bundles(cluster, job).bundles)
        return Wanted([{"CPU": 1.0, "GPU": 1.0}] * (processes or max(cluster.gpus - used, 1)), "PACK")
    if cluster.tpu_hosts:
        chips = float(max(cluster.tpu_hosts))
        return Wanted([{"CPU": 1.0, "TPU": chips}] * (processes or len(cluster.tpu_hosts)), "STRICT_SPREAD")
    count = processes or cluster.nodes
    return Wanted([{"CPU": 1.0}] * count, "STRICT_SPREAD" if count <= cluster.nodes else "PACK")


def place(cluster: Cluster, wanted: Wanted, what: str) -> Bundles:
    """Hold the resources. Raises ConfigError when the cluster does not have them free within two minutes."""
    from ray.util import placement_group

    if not wanted.bundles:
        return Bundles(None, wanted)
    group = placement_group(wanted.bundles, strategy=wanted.strategy)
    if not group.wait(_PLACING_S):
        raise ConfigError(
            f"the Ray cluster has no room for {len(wanted.bundles)} {what} of {wanted.bundles[0]} "
            f"({wanted.strategy}) after {_PLACING_S:.0f} s; it has {cluster.nodes} nodes with {cluster.gpus} GPUs in "
            "all. Free some, or give fewer --processes."
        )
    return Bundles(group, wanted)
