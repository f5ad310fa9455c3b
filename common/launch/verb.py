"""The verb launch: the options of each kind of cluster, and what is done with them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.config import ConfigError
from common.interrupt import INTERRUPTED
from common.launch import gke, ray_cluster, slurm
from common.launch.job import Job, read_job, write_file
from common.launch.watching import LaunchFailed


class _Option(NamedTuple):
    """An option: the clusters that it is for, its type, its default (None where it must be given), what it says."""

    clusters: tuple[str, ...]
    type: Callable[[str], Any]
    default: Any
    help: str


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: must not be negative")
    return number


def at_least_one(text: str) -> int:
    """An option's whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


_OPTIONS = {
    "out": _Option(("slurm", "gke"), Path, Path(), "the job file; default: named after run.dir"),
    "grace": _Option(("slurm", "gke"), at_least_one, 600, "seconds to finish a step and save before the job's end"),
    "nodes": _Option(("slurm",), at_least_one, None, "hosts"),
    "gpus-per-node": _Option(("slurm",), _count, None, "GPUs of each; 0: none"),
    "processes-per-node": _Option(("slurm",), at_least_one, 0, "of the trainer; default: one a GPU"),
    "cpus-per-process": _Option(("slurm",), _count, 0, "CPUs of each; default: what the cluster gives"),
    "time": _Option(("slurm",), str, "", "as sbatch has it"),
    "partition": _Option(("slurm",), str, "", "as sbatch has it"),
    "account": _Option(("slurm",), str, "", "as sbatch has it"),
    "target": _Option(("gke",), str, None, "a TPU slice, such as v5p:4x4x8"),
    "slices": _Option(("gke",), at_least_one, 1, "of the same topology"),
    "image": _Option(("gke",), str, None, "a container image with safework[tpu]"),
    "volume": _Option(("gke",), str, None, "CLAIM:FOLDER, a volume claim and the folder at which every host sees it"),
    "processes": _Option(("ray",), at_least_one, 0, "of the trainer; default: one a GPU, or one a host"),
    "address": _Option(("ray",), str, "", "of the cluster; default: $RAY_ADDRESS, or else this machine alone"),
    "restarts": _Option(("gke", "ray"), _count, 3, "of the trainer as a whole, after failures"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of all clusters."""
    parser.add_argument("--on", required=True, choices=["slurm", "gke", "ray"], help="the kind of cluster")
    for name, option in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=option.type, help=f"{', '.join(option.clusters)}: {option.help}")


def launch(arguments: argparse.Namespace) -> int:
    """Write the job file of a cluster, or run the job on Ray; returns the exit status."""
    given = vars(arguments)
    chosen = {name.replace("-", "_"): _value(arguments.on, name, given) for name in _OPTIONS}
    job = read_job(arguments.config)
    match arguments.on:
        case "slurm":
            return _on_slurm(job, chosen)
        case "gke":
            return _on_gke(job, chosen)
    asked = ray_cluster.Ray(chosen["processes"], chosen["address"], chosen["restarts"])
    try:
        return ray_cluster.run(job, asked, _say)
    except LaunchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("stopped at once; what was done since the last checkpoint is lost.")
        return INTERRUPTED


def _value(cluster: str, name: str, given: dict[str, Any]) -> Any:
    """What was given for an option, or its default. Raises ConfigError for one of another cluster, and for one missing
    that has none.
    """
    option, value = _OPTIONS[name], given[name.replace("-", "_")]
    if cluster not in option.clusters:
        if value is not None:
            raise ConfigError(f"--{name} {value}: is for --on {' and '.join(option.clusters)}. Leave it out.")
        return option.default
    if value is None and option.default is None:
        raise ConfigError(f"--{name} is not given, and --on {cluster} needs it: {option.help}.")
    return option.default if value is None else value


def _on_slurm(job: Job, chosen: dict[str, Any]) -> int:
    processes = chosen["processes_per_node"] or chosen["gpus_per_node"]
    if not processes:
        raise ConfigError("--gpus-per-node 0: then --processes-per-node must say how many processes a node has.")
    sizes = (chosen["nodes"], chosen["gpus_per_node"], processes, chosen["cpus_per_process"], chosen["grace"])
    names = ("time", "partition", "account")
    for name in names:
        if len(chosen[name].split()) > 1:
            raise ConfigError(f"--{name} {chosen[name]!r}: holds a space, where an #SBATCH line ends. Give one word.")
    asked = slurm.Slurm(*sizes, *(chosen[name].strip() for name in names))
    return _write(job, slurm.job_file(job, asked), _out(job, chosen, ".sbatch"), "sbatch {}")


def _on_gke(job: Job, chosen: dict[str, Any]) -> int:
    where = (gke.read_target(chosen["target"]), chosen["slices"], chosen["image"], chosen["volume"])
    text = gke.job_file(job, gke.Gke(*where, chosen["grace"], chosen["restarts"]))
    for name in job.launched:
        _say(f"{name}: is not started there; give servers.{name}.urls those of a server that the pods reach")
    return _write(job, text, _out(job, chosen, ".yaml"), "kubectl apply -f {}")


def _out(job: Job, chosen: dict[str, Any], ending: str) -> Path:
    return chosen["out"] if chosen["out"] != Path() else Path(job.name + ending)


def _write(job: Job, text: str, out: Path, submit: str) -> int:
    write_file(out, text)
    for sentence in job.elsewhere:
        _say(sentence)
    _say(f"{out}: submit it by: {submit.format(shlex.quote(str(out)))}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)
